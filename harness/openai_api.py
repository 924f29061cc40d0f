"""An edited model behind OpenAI's completions and chat completions, over HTTP."""

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from harness.paths import shown
from harness.questions import Limits, Refusal, read_question
from harness.served import Served
from harness.worker import Begun, Job, Part, Worker, closing

logger = logging.getLogger(__name__)

HEADERS = {
    401: {"www-authenticate": "Bearer"},
    429: {"retry-after": "1"},
    503: {"retry-after": "1"},
    504: {"x-should-retry": "false"},  # openai's client would, and it would take as long again
}


def application(served: Served, *, limits: Limits, key: str | None) -> Starlette:
    """The server as an ASGI application; its ``state.worker`` is the thread that has the model.

    key: what clients must give, if anything.
    """
    worker, name, created = Worker(served, limits), served.manifest.folder.resolve().name, int(time.time())
    model = {"id": name, "object": "model", "created": created, "owned_by": "seqmmr"}

    async def health(_: Request) -> JSONResponse:
        if worker.closing:
            raise closing()
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> JSONResponse:
        _check_key(request, key)
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> JSONResponse:
        _check_key(request, key)
        asked = request.path_params["model"]
        if asked != name:
            raise Refusal(404, f"no model {shown(asked)} here; known: {name!r}", code="model_not_found")
        return JSONResponse(model)

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return _response(error)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        refusal = Refusal(error.status_code, f"{request.method} {shown(request.url.path)}: {error.detail}")
        return _response(refusal, error.headers)

    async def failed(_: Request, error: Exception) -> Response:
        return _response(Refusal(500, f"the request failed: {type(error).__name__}"))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            worker.close()
            await asyncio.to_thread(worker.join, 10)

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", one_model),
            *(
                Route(path, _Answers(worker, name, key, chat=chat), methods=["POST"])
                for path, chat in (("/v1/completions", False), ("/v1/chat/completions", True))
            ),
        ],
        exception_handlers={Refusal: refused, HTTPException: unknown, Exception: failed},
        lifespan=lifespan,
    )
    app.state.worker = worker
    return app


def _response(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(refusal.to_json(), refusal.status, headers or HEADERS.get(refusal.status))


def _check_key(request: Request, key: str | None) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = key is None or secrets.compare_digest(given.encode("latin-1"), key.encode())
    if key is not None and not (right and scheme.lower() == "bearer"):
        raise Refusal(401, "this server wants its key: Authorization: Bearer KEY", code="invalid_api_key")


async def _body(request: Request, most: int) -> Any:
    """The JSON of a request's body."""
    too_large = Refusal(413, f"the body is larger than {most} bytes", code="request_too_large")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and (len(said) > 15 or int(said) > most):
        raise too_large
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > most:
            raise too_large
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON: {shown(str(error))}") from None


class _Answers:
    """Answers requests of one kind; an ASGI application, since it must see a client hang up."""

    def __init__(self, worker: Worker, model: str, key: str | None, *, chat: bool) -> None:
        self.worker, self.model, self.key, self.chat = worker, model, key, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, limits = Request(scope, receive), self.worker.limits
        _check_key(request, self.key)
        reply = _Reply(send, chat=self.chat, model=self.model)
        job: Job | None = None
        response: Response | None = None
        watch: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(limits.timeout):
                body = await _body(request, limits.max_bytes)
                route = request.headers.get("x-seqmmr-route")
                question = read_question(body, chat=self.chat, model=self.model, limits=limits, route=route)
                job = Job(question, asyncio.get_running_loop())
                self.worker.submit(job)
                watch = asyncio.create_task(_tell_of_hang_up(receive, job))
                response = await reply.answer(job)
        except ClientDisconnect:
            reply.outcome = "hung up"
        except TimeoutError:
            refusal = Refusal(504, f"no answer within {limits.timeout:g} s", code="time_limit")
            response = await reply.refused(refusal)
        except Refusal as refusal:
            response = await reply.refused(refusal)
        finally:
            if watch is not None:
                watch.cancel()
            if job is not None:
                self.worker.drop(job)
            reply.log(scope["path"], job)
        if response is not None:
            await response(scope, receive, send)


async def _tell_of_hang_up(receive: Receive, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.events.put_nowait(ClientDisconnect())


class _Reply:
    """What goes back to one client, in OpenAI's form."""

    def __init__(self, send: Send, *, chat: bool, model: str) -> None:
        self.send, self.chat, self.model = send, chat, model
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created, self.arrived = int(time.time()), time.monotonic()
        self.begun: Begun | None = None
        self.streaming, self.tokens, self.outcome = False, 0, "cancelled"

    async def answer(self, job: Job) -> Response | None:
        """The answer, or None where it was streamed."""
        self.begun = begun = await job.begun()
        if job.question.stream:
            await self._stream(job, begun)
            self.outcome = "200"
            return None
        choices: list[dict[str, Any]] = []
        async for part in job.parts():
            self.tokens += part.tokens
            said: dict[str, Any] = {"text": part.text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": part.text, "refusal": None}}
            choices.append(self._choice(part, said))
        self.outcome = "200"
        whole = self._head("chat.completion", choices) | {"usage": self._usage(begun)}
        return JSONResponse(whole, headers=begun.headers())

    async def refused(self, refusal: Refusal) -> Response | None:
        """Why there is no answer; where one was begun, its last word."""
        self.outcome = str(refusal.status)
        if not self.streaming:
            return _response(refusal)
        with suppress(TimeoutError):
            async with asyncio.timeout(1):  # a client that does not read is not waited for
                await self._event(json.dumps(refusal.to_json()), more=False)
        return None

    async def _stream(self, job: Job, begun: Begun) -> None:
        headers = {"content-type": "text/event-stream", "cache-control": "no-store"} | begun.headers()
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": 200, "headers": raw})
        self.streaming = True
        usage: dict[str, Any] = {"usage": None} if job.question.include_usage else {}
        seen: set[int] = set()

        async def chunk(choices: Sequence[dict[str, Any]], more: dict[str, Any]) -> None:
            await self._event(json.dumps(self._head("chat.completion.chunk", choices) | more))

        async for part in job.parts():
            self.tokens += part.tokens
            said: dict[str, Any] = {"text": part.text}
            if self.chat:
                role = {} if part.index in seen else {"role": "assistant"}
                said = {"delta": role | {"content": part.text}}
            seen.add(part.index)
            await chunk([self._choice(part, said)], usage)
        if usage:
            await chunk([], {"usage": self._usage(begun)})
        await self._event("[DONE]", more=False)

    def log(self, path: str, job: Job | None) -> None:
        """One line without any text of the request; prompts for those who debug."""
        headers = self.begun.headers() if self.begun else {}
        logger.info(
            "%s %s: %s after %.2f s, route %s, score %s, %d and %d tokens",
            self.id,
            path,
            self.outcome,
            time.monotonic() - self.arrived,
            headers.get("x-seqmmr-route", "none"),
            headers.get("x-seqmmr-score", "none"),
            self.begun.tokens if self.begun else 0,
            self.tokens,
        )
        if job is not None:
            logger.debug("%s prompts: %r", self.id, job.question.prompts)

    async def _event(self, data: str, *, more: bool = True) -> None:
        body = f"data: {data}\n\n".encode()
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    def _head(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        kind = kind if self.chat else "text_completion"
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices
        }  # fmt: skip

    def _choice(self, part: Part, said: dict[str, Any]) -> dict[str, Any]:
        return {"index": part.index, **said, "logprobs": None, "finish_reason": part.reason}

    def _usage(self, begun: Begun) -> dict[str, int]:
        return {
            "prompt_tokens": begun.tokens,
            "completion_tokens": self.tokens,
            "total_tokens": begun.tokens + self.tokens,
        }
