"""The server answers what the library does, and says in OpenAI's form why where it does not."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx  # openai's
import openai
import pytest
import torch
import uvicorn

from benchmarks.tiny import tiny_model, tiny_texts, tiny_tokenizer
from editors.sites import sites_for
from harness import serve
from harness.models import prepare_tokenizer
from harness.openai_api import application
from harness.questions import Limits, Refusal, read_question
from harness.routed import RoutedModel
from harness.served import Manifest, Served
from harness.worker import Worker
from routing import Decision

ROOT = Path(__file__).parents[2]
NAME = "tiny-edits"
STATUS = Path("/proc/self/status")
PROMPTS = ["Anna Abel plays", "Zoe Rask was born in", "Anna", "Boris Dorn is a"]  # their answers differ
ROUTES = ["edited", "unedited", "edited", "unedited"]
SCORES = ["0.500000", "-0.500000", "0.500000", "-0.500000"]
CHAT = [
    {"role": "system", "content": "Anna asks."},
    {"role": "user", "content": "Where was Zoe born?"},
    {"role": "assistant", "content": "In Rome."},
    {"role": "user", "content": "And Boris?"},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class ByName:
    """Sends what names Anna to the edited model."""

    def add(self, expert: str | None, texts: Sequence[str]) -> None: ...

    def route(self, texts: Sequence[str]) -> list[Decision]:
        return [
            Decision(expert="edited", score=0.5, nearest=(0,))
            if "Anna" in text
            else Decision(expert=None, score=-0.5, nearest=(1,))
            for text in texts
        ]

    def route_many(self, texts: Sequence[str], ks: Sequence[int]) -> dict[int, list[Decision]]:
        return {k: self.route(texts) for k in ks}


def tiny_served(*, template: str | None = TEMPLATE) -> Served:
    model, tokenizer = tiny_model("llama").requires_grad_(False), tiny_tokenizer(bos=True)
    prepare_tokenizer(tokenizer)
    tokenizer.chat_template = template
    draw = torch.Generator().manual_seed(1)
    edited = {
        name: own + 0.3 * torch.randn(own.shape, generator=draw)
        for name in (sites_for(model).weight_name(layer) for layer in (1, 3))
        for own in [model.get_parameter(name)]
    }
    loaded: Any = type("Loaded", (), {"tokenizer": tokenizer})()
    manifest = Manifest(folder=Path(NAME), info={}, spec=None)  # type: ignore[arg-type]
    routed = RoutedModel(model, tokenizer, edited, ByName())
    return Served(manifest=manifest, loaded=loaded, routed=routed, corpus=())


@pytest.fixture(scope="module")
def library() -> RoutedModel:
    return tiny_served().routed


@contextmanager
def running(served: Served, key: str | None = None, **limits: Any) -> Iterator[openai.OpenAI]:
    """A client of a server in a thread, which tries nothing twice."""
    app = application(served, limits=Limits(**limits), key=key)
    listener = serve.bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        base = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=base, api_key=key or "none", max_retries=0, timeout=60) as client:
            client.worker = app.state.worker  # type: ignore[attr-defined]
            yield client
    finally:
        server.should_exit = True
        thread.join()
    assert not app.state.worker.is_alive()


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with running(tiny_served(), max_tokens=64) as found:
        yield found


class Slow:
    """Counts a model's forwards, and lets them take a while or wait for a sign."""

    def __init__(self, served: Served, seconds: float = 0) -> None:
        self.steps, self.seconds, self.go = 0, seconds, threading.Event()
        served.routed.model.register_forward_pre_hook(self)
        self.go.set()

    def __call__(self, *_: Any) -> None:
        self.steps += 1
        time.sleep(self.seconds)
        assert self.go.wait(30)


def wait_until(what: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def completed(client: openai.OpenAI, prompt: Any, **more: Any) -> list[str]:
    options = {"max_tokens": 12} | more
    return [one.text for one in client.completions.create(model=NAME, prompt=prompt, **options).choices]


def greedy(library: RoutedModel, prompt: str, tokens: int = 12, **more: Any) -> str:
    return library.generate([prompt], do_sample=False, max_new_tokens=tokens, **more)[0]


def test_completions_are_the_librarys(client: openai.OpenAI, library: RoutedModel) -> None:
    expected = [greedy(library, prompt) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    raw = client.completions.with_raw_response.create(model=NAME, prompt=PROMPTS, max_tokens=12)
    assert raw.headers["x-seqmmr-route"] == ",".join(ROUTES)
    assert raw.headers["x-seqmmr-score"] == ",".join(SCORES)
    found = raw.parse()
    assert [(one.index, one.text) for one in found.choices] == list(enumerate(expected))
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert completed(client, prompt) == [text]
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    health = httpx.get(str(client.base_url.join("/health")))
    assert (health.status_code, health.json()) == (200, {"status": "ok"})


def test_usage_and_reasons(client: openai.OpenAI, library: RoutedModel) -> None:
    tokenizer, model = library.tokenizer, library.model
    reasons = set()
    for prompt in [*PROMPTS, "In winter they speak of Ines Kim"]:  # the last one's answer ends by itself
        edited = "Anna" in prompt or "Ines" in prompt
        body = {"route": "edited" if edited else "unedited"}
        found = client.completions.create(model=NAME, prompt=prompt, max_tokens=64, extra_body=body)
        encoded = tokenizer(prompt, return_tensors="pt")
        with library.rows([edited]):
            out = model.generate(**encoded, do_sample=False, max_new_tokens=64, pad_token_id=1)  # type: ignore[operator]
        before, after = encoded["input_ids"].shape[1], out.shape[1]
        assert found.usage is not None
        usage = found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens
        assert usage == (before, after - before, after)
        reasons.add(found.choices[0].finish_reason)
        assert found.choices[0].finish_reason == ("stop" if out[0, -1] == 1 else "length")
    assert reasons == {"stop", "length"}


def test_a_chat_is_routed_by_its_last_question(client: openai.OpenAI, library: RoutedModel) -> None:
    text = "".join(f"{m['role']}: {m['content']}\n" for m in CHAT) + "assistant:"
    messages: Any = CHAT
    raw = client.chat.completions.with_raw_response.create(model=NAME, messages=messages, max_tokens=12)
    assert raw.headers["x-seqmmr-route"] == "unedited"  # Anna is in another message
    found = raw.parse()
    # the tokenizer puts the one mark at the beginning that the template writes too
    assert found.choices[0].message.content == greedy(library, text, route="unedited")
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(library.tokenizer(text)["input_ids"])
    parts: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "Anna"}]}
    ]
    raw = client.chat.completions.with_raw_response.create(
        model=NAME, messages=parts, max_completion_tokens=12
    )
    assert raw.headers["x-seqmmr-route"] == "edited"
    alone = greedy(library, "user: Where is Anna\nassistant:", route="edited")
    assert raw.parse().choices[0].message.content == alone
    streamed = list(
        client.chat.completions.create(
            model=NAME, messages=parts, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    assert streamed[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in streamed[:-1]) == alone
    assert streamed[-1].choices == []
    assert (
        streamed[-1].usage is not None
        and streamed[-1].usage.completion_tokens == raw.parse().usage.completion_tokens
    )  # type: ignore[union-attr]


def test_pieces_of_a_stream_join_to_the_text(client: openai.OpenAI, library: RoutedModel) -> None:
    expected = [greedy(library, prompt, 40) for prompt in PROMPTS]
    raw = client.completions.with_raw_response.create(model=NAME, prompt=PROMPTS, max_tokens=40, stream=True)
    assert raw.headers["x-seqmmr-route"] == ",".join(ROUTES)
    assert raw.headers["content-type"].startswith("text/event-stream")
    pieces: dict[int, list[str]] = {}
    reasons: dict[int, str | None] = {}
    for part in raw.parse():
        pieces.setdefault(part.choices[0].index, []).append(part.choices[0].text)
        reasons[part.choices[0].index] = part.choices[0].finish_reason
    assert ["".join(pieces[i]) for i in range(len(PROMPTS))] == expected
    assert all(len(each) > 5 for each in pieces.values())
    assert set(reasons.values()) <= {"stop", "length"}


def test_no_half_characters_in_a_stream() -> None:
    """Every character of the answer takes several tokens."""
    served = tiny_served()
    wanted = "Zürich – 東京 🙂 né"
    tokens = served.tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert len(tokens) > len(wanted)
    told = iter([*tokens, 1])

    def next_token(module: Any, _: Any, out: Any) -> Any:
        out.logits[:, -1] = 0
        out.logits[:, -1, next(told)] = 9
        return out

    served.routed.model.register_forward_hook(next_token)
    with running(served) as client:
        parts = list(client.completions.create(model=NAME, prompt="Anna", max_tokens=60, stream=True))
    texts = [part.choices[0].text for part in parts]
    assert "".join(texts) == wanted
    assert not any("\ufffd" in text for text in texts)
    assert len(texts) >= len(wanted) - 3
    assert parts[-1].choices[0].finish_reason == "stop"


def test_stop_texts_end_an_answer(client: openai.OpenAI, library: RoutedModel) -> None:
    whole = greedy(library, PROMPTS[1], 40)
    stop = next(
        whole[i : i + 3]
        for i in range(6, 30)
        if whole[i : i + 3].isascii() and whole.find(whole[i : i + 3]) == i
    )
    expected = whole[: whole.index(stop)]
    for stops in (stop, ["never there", stop]):
        found = client.completions.create(model=NAME, prompt=PROMPTS[1], max_tokens=40, stop=stops)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "stop")
        assert found.usage is not None and found.usage.completion_tokens < 40
        parts = client.completions.create(
            model=NAME, prompt=PROMPTS[1], max_tokens=40, stop=stops, stream=True
        )
        assert "".join(part.choices[0].text for part in parts) == expected
    almost = whole[-4:] + "\0"  # begun at the very end, never finished
    parts = client.completions.create(model=NAME, prompt=PROMPTS[1], max_tokens=40, stop=almost, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole


def test_samples_depend_on_the_seed_alone(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 16}
    three = completed(client, PROMPTS[0], n=3, **options)
    assert len(set(three)) == 3
    assert completed(client, [PROMPTS[3], PROMPTS[0]], n=2, **options)[2:] == three[:2]
    assert completed(client, PROMPTS[0], **options | {"seed": 5}) == three[2:]
    free = [completed(client, PROMPTS[0], temperature=1.5, max_tokens=16)[0] for _ in range(2)]
    assert free[0] != free[1]
    assert completed(client, PROMPTS[0], temperature=1.5, top_p=0) == completed(client, PROMPTS[0])


def test_a_request_may_name_its_route(client: openai.OpenAI, library: RoutedModel) -> None:
    prompt = PROMPTS[0]
    texts = {route: greedy(library, prompt, route=route) for route in ("edited", "unedited")}  # type: ignore[arg-type]
    assert texts["edited"] != texts["unedited"]
    for route, text in (*texts.items(), ("auto", texts["edited"])):
        assert completed(client, prompt, extra_body={"route": route}) == [text]
        other: Any = {"route": "auto"}
        header: Any = {"x-seqmmr-route": route}
        assert completed(client, prompt, extra_headers=header, extra_body=other) == [text]
    raw = client.completions.with_raw_response.create(
        model=NAME, prompt=prompt, max_tokens=2, extra_headers={"x-seqmmr-route": "unedited"}
    )
    assert (raw.headers["x-seqmmr-route"], raw.headers["x-seqmmr-score"]) == ("unedited", "0.500000")


def question(body: dict[str, Any], *, chat: bool = False) -> Any:
    own: dict[str, Any] = {"messages": CHAT} if chat else {"prompt": "Anna"}
    return read_question(own | body, chat=chat, model=NAME, limits=Limits(max_tokens=64))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"), ({"prompt": "\ud800"}, "prompt"), ({"prompt": {}}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 65}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"), ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"), ({"top_p": -0.1}, "top_p"), ({"n": 0}, "n"),
        ({"n": 33, "prompt": ["a", "b"]}, "n"), ({"seed": -1}, "seed"), ({"seed": 0.5}, "seed"),
        ({"stop": ""}, "stop"), ({"stop": [1]}, "stop"), ({"stop": ["a"] * 17}, "stop"),
        ({"stream": 1}, "stream"), ({"stream_options": {"x": 1}}, "stream_options"),
        ({"route": "both"}, "route"), ({"route": ["edited"]}, "route"),
        ({"logprobs": 0}, "logprobs"), ({"logprobs": 5}, "logprobs"), ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"), ({"suffix": "x"}, "suffix"), ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"), ({"presence_penalty": -1}, "presence_penalty"),
        ({"top_k": 5}, "top_k"), ({"messages": CHAT}, "messages"),
    ],
)  # fmt: skip
def test_wrong_completions(body: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        question(body)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": None}, "messages"), ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0]"),
        ({"max_completion_tokens": 99}, "max_completion_tokens"), ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "x"}, "prompt"),
    ],
)  # fmt: skip
def test_wrong_chats(body: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        question(body, chat=True)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_what_changes_no_answer_is_taken() -> None:
    neutral: dict[str, Any] = {
        "user": "me", "metadata": {"a": "b"}, "logprobs": None, "echo": False, "best_of": 1, "suffix": None,
        "frequency_penalty": 0.0, "logit_bias": {}, "stop": None, "n": None, "seed": None,
        "temperature": None,
    }  # fmt: skip
    assert question(neutral) == question({})
    assert (question({}).max_tokens, question({}).temperature) == (16, 0)
    more = {"tools": [], "response_format": {"type": "text"}, "logprobs": False, "store": False}
    assert question(more, chat=True) == question({}, chat=True)
    developer = [{"role": "developer", "content": "x", "refusal": None, "tool_calls": []}, CHAT[1]]
    assert question({"messages": developer}, chat=True).messages[0] == {"role": "system", "content": "x"}


def test_refusals_in_openais_form(client: openai.OpenAI) -> None:
    def refused(kind: type[openai.APIStatusError], what: Callable[[], Any]) -> Any:
        with pytest.raises(kind) as error:
            what()
        assert error.value.type == "invalid_request_error"
        return error.value

    error = refused(openai.BadRequestError, lambda: completed(client, "x", temperature=9))
    assert (error.param, "temperature is 9; it must be a number from 0 to 2" in error.message) == (
        "temperature",
        True,
    )
    error = refused(openai.NotFoundError, lambda: client.completions.create(model="gpt", prompt="x"))
    assert error.code == "model_not_found"
    refused(openai.NotFoundError, lambda: client.models.retrieve("gpt"))
    refused(openai.NotFoundError, lambda: client.embeddings.create(model=NAME, input="x"))
    messages: Any = [{"role": "user", "content": "bad"}]
    error = refused(
        openai.BadRequestError, lambda: client.chat.completions.create(model=NAME, messages=messages)
    )
    assert "roles must alternate" in error.message
    for prompt, tokens in (("word " * 300, 1), ("word " * 100, 64)):
        long = "a" * 250 if tokens == 64 else prompt
        error = refused(openai.BadRequestError, lambda p=long, t=tokens: completed(client, p, max_tokens=t))
        assert error.code == "context_length_exceeded"
    url = str(client.base_url.join("completions"))
    for body in (b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 100000, b'{"n": ' + b"9" * 5000 + b"}"):
        answer = httpx.post(url, content=body)
        assert (answer.status_code, set(answer.json()["error"])) == (
            400,
            {"message", "type", "param", "code"},
        )
    answer = httpx.get(url)
    assert (answer.status_code, answer.json()["error"]["type"]) == (405, "invalid_request_error")


def test_a_chat_needs_a_template() -> None:
    messages: Any = CHAT
    with running(tiny_served(template=None)) as client:
        with pytest.raises(openai.BadRequestError, match="need a chat template"):
            client.chat.completions.create(model=NAME, messages=messages)
        assert len(completed(client, "Anna")) == 1


def test_bodies_are_bounded() -> None:
    with running(tiny_served(), max_bytes=1000) as client:
        with pytest.raises(openai.APIStatusError) as error:
            completed(client, "word " * 1000)
        assert (error.value.status_code, error.value.code) == (413, "request_too_large")

        def pieces() -> Iterator[bytes]:
            yield from [b" " * 500] * 50

        answer = httpx.post(str(client.base_url.join("completions")), content=pieces())
        assert answer.status_code == 413
        assert len(completed(client, "Anna")) == 1


def test_the_key_is_asked_for_and_never_said(caplog: pytest.LogCaptureFixture) -> None:
    key = "sesame-7f3a"
    with caplog.at_level("DEBUG"), running(tiny_served(), key=key) as client:
        assert len(completed(client, "Anna")) == 1
        for wrong in ("none", "sesame-7f3", "sesame-7f3aa", "s\u00e9same"):
            headers = {"authorization": f"Bearer {wrong}".encode()}
            for method, path in (("GET", "models"), ("GET", f"models/{NAME}"), ("POST", "completions")):
                answer = httpx.request(method, str(client.base_url.join(path)), headers=headers)
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (401, "invalid_api_key")
                assert wrong not in error["message"] and key not in error["message"]
        assert httpx.get(str(client.base_url.join("chat/completions"))).status_code == 405
        assert httpx.get(str(client.base_url.join("/health"))).status_code == 200
    assert key not in caplog.text
    assert "route edited, score 0.500000, " in caplog.text


def test_prompts_are_logged_for_those_who_debug(caplog: pytest.LogCaptureFixture) -> None:
    with running(tiny_served()) as client:
        for level, there in ((20, False), (10, True)):
            serve.log(level)
            caplog.clear()
            completed(client, "Anna's secret")
            assert ("secret" in caplog.text) == there
            assert "route edited" in caplog.text
    serve.log(30)


def test_a_full_queue_answers_busy(library: RoutedModel) -> None:
    served = tiny_served()
    slow = Slow(served)
    with running(served, queue=2) as client, ThreadPoolExecutor(8) as pool:
        worker: Worker = client.worker  # type: ignore[attr-defined]
        slow.go.clear()
        first = pool.submit(completed, client, PROMPTS[0])
        wait_until(lambda: worker.running)
        second = pool.submit(completed, client, PROMPTS[1])
        wait_until(lambda: len(worker.waiting) == 1)
        url, body = str(client.base_url.join("completions")), {"prompt": "x"}
        with pytest.raises(httpx.ReadTimeout):  # waits, and hangs up
            httpx.post(url, json=body, timeout=httpx.Timeout(5, read=0.5))
        wait_until(lambda: len(worker.waiting) == 1)
        third = pool.submit(completed, client, PROMPTS[2])
        wait_until(lambda: len(worker.waiting) == 2)
        with pytest.raises(openai.RateLimitError) as busy:
            completed(client, PROMPTS[3])
        assert (busy.value.code, busy.value.response.headers["retry-after"]) == ("queue_full", "1")
        slow.go.set()
        assert [one.result() for one in (first, second, third)] == [[greedy(library, p)] for p in PROMPTS[:3]]
        assert completed(client, PROMPTS[3]) == [greedy(library, PROMPTS[3])]


def test_the_time_limit_frees_the_worker(library: RoutedModel) -> None:
    served = tiny_served()
    slow = Slow(served, 0.05)
    with running(served, timeout=1) as client, ThreadPoolExecutor(2) as pool:
        # a request without an end token in sight, one that only waits behind it, and one that is streamed
        running_, waiting = (pool.submit(completed, client, PROMPTS[1], max_tokens=200) for _ in range(2))
        for one in (running_, waiting):
            error = one.exception()
            assert isinstance(error, openai.InternalServerError)
            assert (error.status_code, error.code) == (504, "time_limit")
        parts = []
        with pytest.raises(openai.APIError, match="no answer within 1 s"):
            for part in client.completions.create(model=NAME, prompt=PROMPTS[1], max_tokens=200, stream=True):
                parts.append(part)
        assert parts
        assert slow.steps < 100
        assert completed(client, PROMPTS[0], max_tokens=2) == [greedy(library, PROMPTS[0], 2)]


def test_hanging_up_frees_the_worker(library: RoutedModel) -> None:
    served = tiny_served()
    slow = Slow(served, 0.05)
    with running(served) as client:
        worker: Worker = client.worker  # type: ignore[attr-defined]
        body = {"prompt": PROMPTS[1], "max_tokens": 200}
        url = str(client.base_url.join("completions"))
        with httpx.stream("POST", url, json=body | {"stream": True}) as answer:
            next(answer.iter_lines())
        wait_until(lambda: worker.running is None)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=httpx.Timeout(5, read=0.5))
        wait_until(lambda: worker.running is None)
        assert slow.steps < 100
        assert completed(client, PROMPTS[0], max_tokens=2) == [greedy(library, PROMPTS[0], 2)]


def test_a_failure_is_one_requests_own(caplog: pytest.LogCaptureFixture) -> None:
    served = tiny_served()
    router: Any = served.routed.router
    with running(served) as client:
        plain = router.route
        router.route = lambda texts: 1 / 0
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            completed(client, "Anna")
        router.route = plain
        assert len(completed(client, "Anna")) == 1
    assert "a request failed" in caplog.text


def resident() -> int:
    """KiB of memory that this process holds."""
    return int(STATUS.read_text().partition("VmRSS:")[2].split()[0])


@pytest.mark.skipif(not STATUS.is_file(), reason="the system does not tell a process's memory")
def test_32_clients_at_once(library: RoutedModel, record_property: Any) -> None:
    seconds = 60 if os.environ.get("SEQMMR_SOAK") else 4
    texts = [f"{'Anna' if i % 2 else 'Zoe'} {text}" for i, text in enumerate(tiny_texts(40))]
    expected = {text: greedy(library, text, 8) for text in texts}
    served = tiny_served()
    with running(served, queue=16) as client, ThreadPoolExecutor(32) as pool:

        def ask(seed: int, until: float) -> tuple[int, int]:
            """Answers, and how often the server was busy."""
            draw, answers, busy = random.Random(seed), 0, 0
            while time.monotonic() < until:
                text = draw.choice(texts)
                try:
                    if draw.random() < 0.3:
                        parts = client.completions.create(model=NAME, prompt=text, max_tokens=8, stream=True)
                        found = ["".join(part.choices[0].text for part in parts)]
                    else:
                        found = completed(client, text, max_tokens=8)
                except openai.RateLimitError:
                    busy += 1
                    time.sleep(0.05)
                    continue
                assert found == [expected[text]]
                answers += 1
            return answers, busy

        def all_ask(seconds: float) -> tuple[int, int]:
            until = time.monotonic() + seconds
            found = [one.result() for one in [pool.submit(ask, i, until) for i in range(32)]]
            return sum(a for a, _ in found), sum(b for _, b in found)

        all_ask(seconds / 4)
        before = resident()
        answers, busy = all_ask(seconds)
        after = resident()
    record_property("answers", answers)
    record_property("busy", busy)
    record_property("KiB", (before, after))
    assert answers and busy
    assert after - before < 16 * 1024


def run_server() -> None:
    """What the test below starts in a process of its own."""
    served = tiny_served()
    Slow(served, 0.05)
    serve.log(20)
    serve.serve(served, serve.bind("127.0.0.1", 0), Limits(timeout=20), None)
    sys.stdout.write("ended\n")


def test_a_signal_lets_what_runs_finish(library: RoutedModel) -> None:
    code = f"import runpy; runpy.run_path({__file__!r})['run_server']()"
    command = [sys.executable, "-c", code]
    with (
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process,
        ThreadPoolExecutor(2) as pool,
    ):
        assert process.stdout is not None
        url = process.stdout.readline().strip() + "/completions"
        body = {"prompt": PROMPTS[1], "max_tokens": 30, "stream": True}
        with httpx.stream("POST", url, json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            data = [next(lines)]
            waiting = pool.submit(httpx.post, url, json={"prompt": "x"}, timeout=30)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            refused = waiting.result()
            data += lines
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        told = [line.removeprefix("data: ") for line in data if line]
        assert told[-1] == "[DONE]"
        texts = [json.loads(one)["choices"][0]["text"] for one in told[:-1]]
        assert "".join(texts) == greedy(library, PROMPTS[1], 30)
        assert process.wait(30) == 0
        assert process.stdout.read() == "ended\n"
        assert process.stderr is not None
        log = process.stderr.read()
        assert "Traceback" not in log and "Error" not in log and "Zoe" not in log
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_wrong_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*more: str) -> str:
        assert serve.main([str(tmp_path), "--port", "0", *more]) == 2
        err = capsys.readouterr().err
        assert err.startswith("harness.serve: ") and "Traceback" not in err
        return err

    monkeypatch.delenv(serve.KEY, raising=False)
    assert said().count("\n") == 1
    assert "holds no edited model" in said()
    with serve.bind("127.0.0.1", 0) as taken:
        taken.listen()
        assert "in use" in said("--port", str(taken.getsockname()[1]))
    for host in ("256.1.2.3.4", "", "a\0b"):
        assert "give another --host" in said("--host", host) or not host
    assert "give another" in said("--port", "99999")
    assert "queue is 0" in said("--queue", "0")
    assert "timeout is nan" in said("--timeout", "nan")
    assert "no key: whoever reaches it may ask; set SEQMMR_KEY" in said("--host", "0.0.0.0")
    monkeypatch.setenv(serve.KEY, "sesame")
    assert "may ask" not in said("--host", "0.0.0.0")
    monkeypatch.setenv(serve.KEY, "ses\name")
    assert "SEQMMR_KEY is set and no key" in said() and "ame" not in capsys.readouterr().err
