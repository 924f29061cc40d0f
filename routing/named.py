"""Routers by name, alone or composed, with their settings checked before anything is loaded."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from routing.alias import AliasConfig, AliasRouter
from routing.api import Embed, Router
from routing.calibrated import Calibrated, CalibratedConfig
from routing.composed import Composed
from routing.relation import RelationConfig, RelationRouter
from routing.subject import SubjectConfig, SubjectRouter
from routing.topk import TopK, TopKConfig

Settings = Mapping[str, Mapping[str, Any]]  # router -> fields of its config

# name -> (config, router); a router is made of its config and what embeds texts
ROUTERS: dict[str, tuple[Any, Any]] = {
    "topk": (TopKConfig, TopK),
    "subject": (SubjectConfig, SubjectRouter),
    "relation": (RelationConfig, RelationRouter),
    "alias": (AliasConfig, AliasRouter),
    "calibrated": (CalibratedConfig, Calibrated),
}


def fields(name: str) -> tuple[str, ...]:
    """The routers that a name consists of, each once; raises ValueError for a name that is none."""
    return tuple(dict.fromkeys(router for every in _parsed(name) for router in every))


def check(name: str, settings: Settings | None = None) -> None:
    """Raises ValueError for an unknown name, or for a field or value that a router of it does not take.

    settings: router -> fields of its config; those of other routers are not looked at.
    """
    for router in fields(name):
        _config(router, settings)


def build(name: str, embed: Embed, settings: Settings | None = None) -> Router:
    """The router of a name: of one of ``ROUTERS``, or of several joined by & (all) and | (any).

    & binds tighter. Raises ValueError as ``check`` does.
    """
    either = [[_made(router, embed, settings) for router in every] for every in _parsed(name)]
    joined = [every[0] if len(every) == 1 else Composed(every, every=True) for every in either]
    return joined[0] if len(joined) == 1 else Composed(joined, every=False)


def _parsed(name: str) -> list[list[str]]:
    """The names joined by &, of each part joined by |."""
    parts = [[router.strip() for router in every.split("&")] for every in name.split("|")]
    for router in (router for every in parts for router in every):
        if router not in ROUTERS:
            of = f" in {name!r}" if router != name else ""
            raise ValueError(
                f"unknown router {router!r}{of}; known: {', '.join(ROUTERS)}; joined by & (all) and | (any)"
            )
    return parts


def _made(router: str, embed: Embed, settings: Settings | None) -> Router:
    made: Router = ROUTERS[router][1](_config(router, settings), embed)
    return made


def _config(router: str, settings: Settings | None) -> Any:
    kind = ROUTERS[router][0]
    given = dict((settings or {}).get(router, {}))
    known = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            raise ValueError(f"router {router!r} has no field {name!r}; known: {known}")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"router {router!r}: {error}") from None
