"""``python -m studies``: what docs/beyond-the-paper.md says of routers and mergers, made again.

    python -m studies routers --data FOLDER --out FOLDER      some minutes on two CPU cores
    python -m studies mergers --data FOLDER --out FOLDER      seven runs of 1,000 edits: a GPU, or a day

Everything is chosen on one half of CounterFact (``studies.records``) and reported on the other. FOLDER of
--data holds local copies of CounterFact, the general tasks and Wikipedia paragraphs.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from harness.encoders import encoder
from harness.paths import cache_folder, write_text
from harness.route_probes import RouteProbe, probe_rows, probe_scores
from reports.cells import scaled
from reports.figures import reliability_figure, trade_off_figure, write_figures
from reports.probes import KINDS, calibration, trade_offs
from reports.record import Score
from routing import Decision
from studies import mergers, routers
from studies.probes import probes_of
from studies.records import EDITS, ORDERS, write_halves

PAGE = Path(__file__).parent.parent / "docs" / "beyond-the-paper.md"
FIGURES = PAGE.with_suffix("")  # a folder of the page's name
COMPARED: dict[str, tuple[str, Mapping[str, Mapping[str, object]]]] = {  # in words -> (router, settings)
    "topk, k = 2 (paper)": ("topk", {}),
    "topk, k = 3": ("topk", {"topk": {"top_k": 3}}),
    "subject": ("subject", {}),
    "subject&relation": ("subject&relation", {}),
    "subject\\|alias": ("subject|alias", {}),
    "calibrated": ("calibrated", {}),
}
DRAWN = ("topk, k = 2 (paper)", "calibrated")  # whose scores are drawn
HELD_OUT = "calibrated, relations held out"  # of the choosing half
ENCODED = ("topk", "subject|alias", "calibrated")  # routers that are compared with other encoders
THRESHOLDS = (-3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0)
TRADED = (
    "alias", "paraphrase_noisy", "chat", "neighborhood", "distracting", "same_subject",
    "same_subject_completion",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the arguments are wrong."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("routers", "mergers"))
    parser.add_argument("--data", required=True, metavar="FOLDER", help="local copies of the data")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="of records, probes, runs")
    parser.add_argument("--fit", action="store_true", help="fit the router 'calibrated' anew, on one half")
    parser.add_argument(
        "--encoders", nargs="+", default=[], metavar="ENCODER", help="others, beside minilm in a table"
    )
    parser.add_argument("--device", default="cpu", help="of the runs of mergers; default: cpu")
    args = parser.parse_args(argv)
    try:
        halves = write_halves(args.data, args.out)
        if args.part == "routers":
            choose, report = halves["choose"], halves[f"report-{ORDERS[0]}"]
            parts = _routers(choose, report, args.data, fit=args.fit)
            if args.encoders:
                parts |= {"encoders": _encoders(choose, report, args.data, ["minilm", *args.encoders])}
        else:
            embed = encoder("minilm", cache=cache_folder("embeddings"), device="cpu")
            parts, figures = mergers.study(halves, args.data, args.out, embed, device=args.device)
            write_figures(figures, FIGURES)
    except ValueError as error:
        sys.stderr.write(f"python -m studies: {error}\n")
        return 2
    for name, text in parts.items():
        splice(PAGE, name, text)
    return 0


def splice(page: Path, name: str, text: str) -> None:
    """Put text between the page's marks of that name."""
    before, after = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    whole = page.read_text(encoding="utf-8")
    if before not in whole or after not in whole:
        raise ValueError(f"{page} has no marks of {name!r}; restore it")
    pattern = re.compile(f"{re.escape(before)}.*?{re.escape(after)}", re.S)
    write_text(page, pattern.sub(lambda _: f"{before}\n{text}\n\n{after}", whole))


def _routers(choose: Path, report: Path, data: str, *, fit: bool) -> dict[str, str]:
    """The tables of routers by name, and their figures."""
    embed = encoder("minilm", cache=cache_folder("embeddings"), device="cpu")
    chosen_on, probes = probes_of(choose, data, half=0), probes_of(report, data, half=1)
    if fit:
        held_out = routers.fit_all(choose, chosen_on, embed, embed.identity)
    else:
        held_out = [routers.compare(choose, chosen_on, embed, edits) for edits in routers.SIZES]
    scores = routers.leave_one_relation_out(held_out)
    asked = [probe.prompt for probe in probes]
    decided = {
        name: routers.decisions(router, settings, report, asked, embed)
        for name, (router, settings) in COMPARED.items()
    }
    rows = {name: _rows(probes, decided[name]) for name in DRAWN}
    calibrations = {name: found for name, some in rows.items() if (found := calibration(some)) is not None}
    write_figures([reliability_figure(calibrations), trade_off_figure(trade_offs(rows))], FIGURES)
    shares = {name: _scores(probes, [one.expert is not None for one in d]) for name, d in decided.items()}
    of_held_out = [Decision(expert="edited" if s >= 0 else None, score=s, nearest=()) for s in scores]
    shares[HELD_OUT] = _scores(held_out[0].probes, [one.expert is not None for one in of_held_out])
    if (found := calibration(_rows(held_out[0].probes, of_held_out))) is not None:
        calibrations[HELD_OUT] = found
    traded = {at: _scores(probes, [d.score >= at for d in decided["calibrated"]]) for at in THRESHOLDS}
    texts = [probe.prompt for probe in probes if probe.kind in ("paraphrase", "neighborhood", "chat")]
    costs = {
        name: routers.cost(router, settings, report, texts, embed)  # type: ignore[arg-type]
        for name, (router, settings) in COMPARED.items()
    }
    return {
        "routers": _share_table(shares),
        "trade-off": _trade_table(traded),
        "calibration": tabulate(
            [(name, f"{c.error:.3f}", f"{c.brier:.3f}") for name, c in calibrations.items()],
            ("router", "expected calibration error", "Brier score"), tablefmt="pipe", disable_numparse=True,
        ),
        "costs": tabulate(
            [(name, f"{cost:,.0f}") for name, cost in costs.items()],
            ("router", "microseconds a query"), tablefmt="pipe", colalign=("left", "right"),
            disable_numparse=True,
        ),
    }  # fmt: skip


def _encoders(choose: Path, report: Path, data: str, names: Sequence[str]) -> str:
    """Routers with several encoders, ``calibrated`` fitted anew for each on one half, asked on the other."""
    chosen_on, probes = probes_of(choose, data, half=0), probes_of(report, data, half=1)
    asked = [probe.prompt for probe in probes]
    lines = []
    for name in names:
        embed = encoder(name, cache=cache_folder("embeddings"), device="cpu")
        compared = [routers.compare(choose, chosen_on, embed, edits) for edits in routers.SIZES]
        fitted = report.with_name(f"calibrated-{Path(name).name}.json")
        routers.write(routers.fit(compared, embed.identity, routers.TRAINED_ON), fitted)
        settings = {"calibrated": {"coefficients": str(fitted)}}
        for router in ENCODED:
            decided = routers.decisions(router, settings, report, asked, embed)
            shares = _scores(probes, [one.expert is not None for one in decided])
            figures = (scaled(shares[kind].value, 1) for kind in TRADED)
            lines.append((Path(name).name, router.replace("|", "\\|"), *figures))
    titles = [KINDS[kind].title for kind in TRADED]
    return tabulate(lines, ("encoder", "router", *titles), tablefmt="pipe", disable_numparse=True)


def _rows(probes: Sequence[RouteProbe], decided: Sequence[Decision]) -> list[dict[str, object]]:
    """As a run's cases have them."""
    return [
        row | {"route": decision.expert or "unedited", "route_score": decision.score}
        for row, decision in zip(probe_rows(probes, EDITS), decided, strict=True)
    ]


def _scores(probes: Sequence[RouteProbe], sent: Sequence[bool]) -> dict[str, Score]:
    """Kind -> its share."""
    return {score.metric.removeprefix("route_"): score for score in probe_scores(probes, sent, seed=0)}


def _share_table(shares: Mapping[str, Mapping[str, Score]]) -> str:
    """A line per kind, a column per router; those that should go first."""
    own = next(iter(shares.values()))
    kinds = sorted((kind for kind in KINDS if kind in own), key=lambda kind: not KINDS[kind].to_edited)
    lines = [
        (
            f"{KINDS[kind].title} ({own[kind].n:,})", "edited" if KINDS[kind].to_edited else "unedited",
            *(_share(found.get(kind)) for found in shares.values()),
        )
        for kind in kinds
    ]  # fmt: skip
    return tabulate(lines, ("probes", "should go to", *shares), tablefmt="pipe", disable_numparse=True)


def _share(score: Score | None) -> str:
    if score is None or score.low is None or score.high is None:
        return "–"
    return f"{scaled(score.value, 1)} [{scaled(score.low, 1)}, {scaled(score.high, 1)}]"


def _trade_table(traded: Mapping[float, Mapping[str, Score]]) -> str:
    lines = [(f"{at:g}", *(scaled(found[kind].value, 1) for kind in TRADED)) for at, found in traded.items()]
    titles = [KINDS[kind].title for kind in TRADED]
    return tabulate(lines, ("threshold", *titles), tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    raise SystemExit(main())
