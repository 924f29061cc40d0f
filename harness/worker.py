"""The thread that has an edited model and answers questions with it, one generation after another.

Not in batches: even with rows of equal length a row of a batch is not bit for bit what it is alone, and an
answer here is the one that the library gives.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import StoppingCriteria

from editors.sites import device_of
from harness.questions import Limits, Question, Refusal, wrong
from harness.routed import Route
from harness.served import Served

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5  # temperatures that are none


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The first that is known of an answer."""

    routes: tuple[str, ...]  # a prompt
    scores: tuple[float, ...]
    tokens: int  # of all prompts

    def headers(self) -> dict[str, str]:
        scores = ",".join(f"{score:.6f}" for score in self.scores)
        return {"x-seqmmr-route": ",".join(self.routes), "x-seqmmr-score": scores}


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some text of one choice; the last part has a reason."""

    index: int
    text: str
    reason: str | None = None
    tokens: int = 0  # of the whole choice


@dataclass(eq=False)
class Job:
    """A question on its way: the worker's thread tells, the event loop's reads."""

    question: Question
    loop: asyncio.AbstractEventLoop
    events: "asyncio.Queue[Begun | Part | Exception | None]" = field(default_factory=asyncio.Queue)
    dropped: bool = False  # nobody reads any more

    def tell(self, event: Begun | Part | Exception | None) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def begun(self) -> Begun:
        event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        assert isinstance(event, Begun)
        return event

    async def parts(self) -> AsyncIterator[Part]:
        while (event := await self.events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            assert isinstance(event, Part)
            yield event


class Worker(threading.Thread):
    """Has the model to itself; answers questions in the order they came."""

    def __init__(self, served: Served, limits: Limits) -> None:
        super().__init__(name="worker", daemon=True)
        self.routed, self.tokenizer = served.routed, served.tokenizer
        self.limits = limits
        config = self.routed.model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        end = self.routed.model.generation_config.eos_token_id
        self.ends = set(end) if isinstance(end, list) else {end}
        self.changed = threading.Condition()
        self.waiting: deque[Job] = deque()
        self.running: Job | None = None
        self.closing = False

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn; Refusal where too many do."""
        with self.changed:
            if self.closing:
                raise closing()
            if len(self.waiting) + (self.running is not None) > self.limits.queue:
                message = f"busy: {self.limits.queue} requests are waiting; try again later"
                raise Refusal(429, message, code="queue_full")
            self.waiting.append(job)
            self.changed.notify()

    def drop(self, job: Job) -> None:
        """Nobody wants this answer any more: it does not wait, or ends with the next token."""
        with self.changed:
            job.dropped = True
            if job in self.waiting:
                self.waiting.remove(job)

    def close(self) -> None:
        """Take nothing more; the running answer goes on, those that wait are refused."""
        with self.changed:
            self.closing = True
            while self.waiting:
                self.waiting.popleft().tell(closing())
            self.changed.notify()

    def run(self) -> None:
        while True:
            with self.changed:
                self.running = None
                self.changed.wait_for(lambda: self.waiting or self.closing)
                if self.closing:
                    return
                job = self.running = self.waiting.popleft()
            try:
                self._answer(job)
            except Refusal as refusal:
                job.tell(refusal)
            except Exception as error:
                logger.exception("a request failed")
                message = f"the answer failed: {type(error).__name__}; the server's log says more"
                job.tell(Refusal(500, message))
            del job

    def _answer(self, job: Job) -> None:
        question = job.question
        prompts = self._encoded(question)
        tokens = [self._room(question, len(ids)) for ids in prompts]
        decisions = [self.routed.route([prompt])[0] for prompt in question.prompts]
        route = question.route or self.routed.default_route
        routes: list[Route] = [
            route if route != "auto" else "unedited" if decision.expert is None else "edited"
            for decision in decisions
        ]
        begun = Begun(
            routes=tuple(routes),
            scores=tuple(decision.score for decision in decisions),
            tokens=sum(map(len, prompts)),
        )
        job.tell(begun)
        for number, (ids, most) in enumerate(zip(prompts, tokens, strict=True)):
            for sample in range(question.n):
                if not job.dropped:
                    with self.routed.rows(routes[number]):
                        self._generate(job, ids, most, sample, number * question.n + sample)
        job.tell(None)

    def _encoded(self, question: Question) -> list[list[int]]:
        """The token ids of every prompt, as the library has them."""
        if question.messages is None:
            return [self.tokenizer(prompt)["input_ids"] for prompt in question.prompts]
        if not self.tokenizer.chat_template:
            what = "need a chat template and this model's tokenizer has none; ask /v1/completions"
            raise wrong("messages", what)
        try:
            text = self.tokenizer.apply_chat_template(
                list(question.messages), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise wrong("messages", f"do not fit this model's chat template: {error}") from None
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _room(self, question: Question, length: int) -> int:
        """How many tokens may be added to a prompt; Refusal if that is fewer than were asked for."""
        if not length:
            raise wrong("prompt", "is empty; ask something")
        wanted = question.max_tokens
        if self.context is None:
            return wanted or self.limits.max_tokens
        room = self.context - length
        if room < (wanted or 1):
            message = f"{length} tokens of prompt and {wanted or 1} of answer do not fit {self.context}"
            raise Refusal(400, f"{message}, this model's context", code="context_length_exceeded")
        return wanted or min(self.limits.max_tokens, room)

    def _generate(self, job: Job, prompt: list[int], most: int, sample: int, index: int) -> None:
        question, model = job.question, self.routed.model
        sampling: dict[str, Any] = {"do_sample": False}
        if question.temperature >= GREEDY_BELOW:
            sampling = {
                "do_sample": True, "temperature": question.temperature, "top_p": question.top_p, "top_k": 0
            }  # fmt: skip
            if question.seed is None:
                torch.seed()
            else:
                torch.manual_seed(question.seed + sample)
        ids = torch.tensor([prompt], device=device_of(model))
        text = _Text(job, index, len(prompt), self.tokenizer)
        out: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=most,
            stopping_criteria=[text],
            **sampling,
        )
        added = out[0, len(prompt) :].tolist()
        text.read(added)
        stopped = text.stopped or added[-1] in self.ends
        job.tell(text.rest("stop" if stopped else "length", len(added)))


class _Text(StoppingCriteria):
    """The text of one generation, followed from token to token; ends it at a stop, or when it is dropped."""

    def __init__(self, job: Job, index: int, start: int, tokenizer: Any) -> None:
        self.job, self.index, self.start, self.tokenizer = job, index, start, tokenizer
        self.follow = job.question.stream or bool(job.question.stop)
        self.text, self.told, self.stopped = "", 0, False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.follow:
            self.read(input_ids[0, self.start :].tolist())
            if self.job.question.stream:
                self._tell_what_stays()
        done = self.stopped or self.job.dropped
        return torch.full((len(input_ids),), done, device=input_ids.device)

    def read(self, tokens: list[int]) -> None:
        """All tokens so far."""
        if self.stopped:
            return
        self.text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        found = [place for stop in self.job.question.stop if (place := self.text.find(stop)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def rest(self, reason: str, tokens: int) -> Part:
        return Part(index=self.index, text=self.text[self.told :], reason=reason, tokens=tokens)

    def _tell_what_stays(self) -> None:
        """Tell the text but what the next token may still change: half a character, the start of a stop."""
        text = self.text if self.stopped else self.text.rstrip("\ufffd")
        if not self.stopped:
            begun = (
                k for stop in self.job.question.stop for k in range(1, len(stop)) if text.endswith(stop[:k])
            )
            text = text[: len(text) - max(begun, default=0)]
        if len(text) > self.told:
            self.job.tell(Part(index=self.index, text=text[self.told :]))
            self.told = len(text)


def closing() -> Refusal:
    """What a request is told that comes or waits while the server ends."""
    return Refusal(503, "the server is shutting down", code="shutting_down")
