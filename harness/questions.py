"""Requests in the form of OpenAI's completions and chat completions, read and checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from harness.paths import shown
from harness.routed import Route

MAX_CHOICES = 64  # answers of one request: prompts times n
DEFAULT_TOKENS = 16  # of a completion, as OpenAI's; a chat's answer may fill what is allowed
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

FIELDS = (  # and prompt, or messages and max_completion_tokens
    "model", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "route",
)  # fmt: skip
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
)  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that would change the answer, and values that do not
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What requests may take."""

    queue: int = 32  # requests that wait; more are answered 429
    max_bytes: int = 1 << 20  # of a request's body
    max_tokens: int = 512  # of one answer
    timeout: float = 120.0  # seconds from a request's arrival to the end of its answer

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a finite number above 0")


class Refusal(Exception):
    """A request that is not answered, and what its client is told."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def to_json(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request, read and checked."""

    prompts: tuple[str, ...]  # what is routed; of a chat the last message of the user
    messages: tuple[dict[str, str], ...] | None  # of a chat
    max_tokens: int | None
    temperature: float
    top_p: float
    n: int
    stop: tuple[str, ...]
    seed: int | None
    stream: bool
    include_usage: bool
    route: Route | None


def read_question(body: Any, *, chat: bool, model: str, limits: Limits, route: str | None = None) -> Question:
    """A request from its body; ``route`` is its header's, which has precedence. Raises Refusal."""
    if not isinstance(body, dict):
        raise Refusal(400, f"the body must be a JSON object, not {shown(body)}")
    given = {name: value for name, value in body.items() if value is not None}
    _check_fields(given, chat=chat)
    if given.get("model", model) != model:
        message = f"no model {shown(given['model'])} here; known: {model!r}"
        raise Refusal(404, message, param="model", code="model_not_found")
    if chat:
        messages = _messages(given.get("messages"))
        prompts = tuple(said["content"] for said in messages if said["role"] == "user")[-1:]
        if not prompts:
            raise wrong("messages", "holds no message of role 'user', by which the route is decided")
    else:
        messages, prompts = None, _texts(given, "prompt", most=MAX_CHOICES)
        if not prompts:
            raise wrong("prompt", "is missing; give a text or a list of texts")
    n = int(_number(given, "n", 1, 1, MAX_CHOICES, whole=True))
    if n * len(prompts) > MAX_CHOICES:
        raise wrong("n", f"times prompts is {n * len(prompts)}; at most {MAX_CHOICES} answers a request")
    tokens = "max_completion_tokens" if chat and "max_completion_tokens" in given else "max_tokens"
    max_tokens = int(_number(given, tokens, 0, 1, limits.max_tokens, whole=True)) or None
    if max_tokens is None and not chat:
        max_tokens = min(DEFAULT_TOKENS, limits.max_tokens)
    stop = _texts(given, "stop", most=16)
    if not all(stop):
        raise wrong("stop", "holds an empty text")
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise wrong("stream_options", f"is {shown(options)}; known: include_usage")
    route = route if route is not None else given.get("route")
    if route is not None and route not in get_args(Route):
        raise wrong("route", f"is {shown(route)}; known: {', '.join(get_args(Route))}")
    return Question(
        prompts=prompts,
        messages=messages,
        max_tokens=max_tokens,
        temperature=_number(given, "temperature", 0, 0, 2),
        top_p=_number(given, "top_p", 1, 0, 1),
        n=n,
        stop=stop,
        seed=int(_number(given, "seed", 0, 0, 2**62, whole=True)) if "seed" in given else None,
        stream=_flag(given, "stream"),
        include_usage=_flag(options, "include_usage"),
        route=route,  # type: ignore[arg-type]
    )


def wrong(param: str, what: str) -> Refusal:
    """Of a field that cannot be taken as it is."""
    return Refusal(400, f"{param} {what}", param=param)


def _check_fields(given: Mapping[str, Any], *, chat: bool) -> None:
    """Refuse what would change the answer and is not done here."""
    known = {*FIELDS, *(("messages", "max_completion_tokens") if chat else ("prompt",))}
    for name, value in given.items():
        neutral = NEUTRAL.get(name, ())
        if name in known or name in IGNORED:
            continue
        if any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral):
            continue
        if name in NEUTRAL:
            message = f"{name} is {shown(value)}, which is not done here; leave it out"
            raise Refusal(400, message, param=name, code="unsupported_value")
        message = f"unknown field {shown(name)}; known: {', '.join(sorted(known))}"
        raise Refusal(400, message, param=name, code="unknown_parameter")


def _number(
    given: Mapping[str, Any], name: str, default: float, low: float, high: float, *, whole: bool = False
) -> float:
    value = given.get(name)
    if value is None:
        return default
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise wrong(name, f"is {shown(value)}; it must be {kind} from {low} to {high}")
    return value


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise wrong(name, f"is {shown(value)}; it must be true or false")
    return value


def _texts(given: Mapping[str, Any], name: str, *, most: int) -> tuple[str, ...]:
    """A text or a list of texts."""
    value = given.get(name, [])
    values = value if isinstance(value, list) else [value]
    if len(values) > most:
        raise wrong(name, f"holds {len(values)} texts; at most {most}")
    return tuple(_text(one, name) for one in values)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise wrong(name, f"holds {shown(value)}, which is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise wrong(name, "holds half a surrogate pair, which is no character") from None
    return value


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    """Role and text of every message."""
    if not isinstance(value, list) or not value:
        raise wrong("messages", f"is {shown(value)}; it must be a list of {{role, content}}")
    found = []
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise wrong(where, f"is {shown(message)}; it must be an object of role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise wrong(f"{where}.role", f"is {shown(role)}; known: {', '.join(ROLES)}")
        for name, more in message.items():
            if name not in {"role", "content"} and more:
                raise wrong(where, f"holds {shown(name)}; only role and content are taken")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise wrong(f"{where}.content", f"holds {shown(part)}; only texts are taken")
        content = "".join(_text(part.get("text"), f"{where}.content") for part in parts)
        found.append({"role": ROLES[role], "content": content})
    return tuple(found)
