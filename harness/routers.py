"""Routers of a spec, their corpus, and what they decide."""

from collections.abc import Mapping, Sequence

from harness.data import EditCase
from harness.grid import Route, route_id, routes_of
from harness.spec import RunSpec
from routing import Decision, Embed, Router, Subject, TopK, build


def build_router(
    spec: RunSpec, route: Route, embed: Embed, cases: Sequence[EditCase], unrelated: Sequence[str]
) -> Router:
    """A router whose corpus are the prompts of some edits, and unrelated texts."""
    router = build(route.router, embed, spec.router_settings(route.top_k))
    router.add("edited", [case.rewrite_prompt for case in cases], subjects_of(cases, aliases=spec.aliases))
    router.add(None, unrelated)
    return router


def subjects_of(cases: Sequence[EditCase], *, aliases: bool) -> list[Subject]:
    """What the edits are about; aliases: with the other names that their records give."""
    return [Subject(name=case.request.subject, aliases=case.aliases if aliases else ()) for case in cases]


def decide(routers: Mapping[Route, Router], spec: RunSpec, texts: Sequence[str]) -> dict[str, list[Decision]]:
    """Decisions on some texts by the name of the route; of a top-k router all k from one search."""
    found: dict[str, list[Decision]] = {}
    for route, router in routers.items():
        name = route_id(spec, route)
        if name in found:
            continue
        if isinstance(router, TopK):
            alike = {other.top_k: other for other in routers if other.router == route.router}
            many = router.route_many(texts, [k for k in alike if k is not None])
            found |= {route_id(spec, alike[k]): decisions for k, decisions in many.items()}
        else:
            found[name] = router.route(texts)
    return found


def routers_of(
    spec: RunSpec, embed: Embed, cases: Sequence[EditCase], unrelated: Sequence[str]
) -> dict[Route, Router]:
    """All routers of a spec's cells over one corpus; those of one search share it."""
    made: dict[Route, Router] = {}
    for route in routes_of(spec):
        shared = next(
            (r for other, r in made.items() if other.router == route.router and isinstance(r, TopK)), None
        )
        made[route] = shared or build_router(spec, route, embed, cases, unrelated)
    return made
