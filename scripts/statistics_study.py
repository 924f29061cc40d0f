"""How much the covariance corpus and its size matter: 100 CounterFact edits scored for each.

    SEQMMR_DATA=DIR python scripts/statistics_study.py --corpus FILE.jsonl.gz

Target values do not depend on the statistics, so they are optimised once and shared by all rows.
Prints the table of docs/statistics.md.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate

import editors.closed_form
from editors import EDITORS
from editors.sites import sites_for
from editors.targets import Targets
from harness import onednn
from harness.data import load_dataset, select
from harness.metrics import edit_scores, resampling_counts, tabulate_cell
from harness.models import find_model, load_model
from harness.scoring import Query, score
from harness.spec import editor_settings
from harness.stats import gather_statistics, load_corpus

EDITS = 100
TOKENS = (2_000, 8_000, 15_000, 30_000, 60_000, 120_000)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", required=True, help="JSONL with text, beside the model's own text")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    args = parser.parse_args(argv)
    loaded = load_model(args.model, find_model(args.model), dtype=torch.float32, device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    settings = editor_settings(args.model, ("memit", "alphaedit"))
    layers = settings["memit"]["layers"]
    names = [sites_for(model).weight_name(layer) for layer in layers]
    onednn.pack_linears(model, leave=set(names))
    base = {name: model.get_parameter(name).detach().clone() for name in names}
    selection, _ = select(load_dataset("counterfact"), edits=EDITS, negatives=1, order="random", seed=0)
    requests = [case.request for case in selection.cases]
    queries = [
        (case, kind, prompt)
        for case in selection.cases
        for kind, prompts in case.prompts.items()
        for prompt in prompts
    ]
    optimise = editors.closed_form.optimise_targets
    shared: list[Targets] = []

    def once(*arguments: Any, **options: Any) -> Targets:
        if not shared:
            shared.append(optimise(*arguments, **options))
        return shared[0]

    editors.closed_form.optimise_targets = once
    rows = []
    for corpus_name in ("self", args.corpus):
        for tokens in args.tokens:
            corpus = load_corpus(
                corpus_name, loaded, limit=max(args.tokens), seed=0, progress=lambda *_: None
            )
            found = gather_statistics(loaded, layers, corpus, limit=tokens, progress=lambda *_: None)
            for editor in settings:
                start = time.perf_counter()
                config, kind = EDITORS[editor]
                stream = kind(config(**settings[editor])).start(
                    model, tokenizer, covariance=found.covariance, seed=0
                )
                stream.edit(requests)
                answers = score(
                    model, tokenizer,
                    [Query(prompt, case.request.target_new, case.target_true) for case, _, prompt in queries],
                )  # fmt: skip
                outcomes = [
                    {"case_id": case.case_id, "kind": kind, "prompt": prompt, "nll_new": a.new.nll,
                     "nll_true": a.true.nll, "argmax_new": a.new.argmax, "argmax_true": a.true.argmax}
                    for (case, kind, prompt), a in zip(queries, answers, strict=True)
                ]  # fmt: skip
                table = tabulate_cell(outcomes)
                scores = {s.metric: s for s in edit_scores(table, None, resampling_counts(EDITS, 0))}
                rows.append(
                    (corpus.name, f"{tokens:,}", editor,
                     *(100 * scores[m].value for m in ("efficacy", "generalization", "locality", "score")),
                     f"[{100 * scores['score'].low:.1f}, {100 * scores['score'].high:.1f}]")
                )  # fmt: skip
                print(*rows[-1], f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
                with torch.no_grad():
                    for name, value in base.items():
                        model.get_parameter(name).copy_(value)
    headers = ("corpus", "tokens", "editor", "efficacy", "generalization", "locality", "Score", "95 %")
    print(tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".1f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
