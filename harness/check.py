"""The check after editing from a file: did every fact take, do its paraphrases, what else has moved.

Every prompt is asked of the unedited and of the edited weights once; the router then says which of the two
answers is the one that is served. So what the router protects from is seen too.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.sites import device_of
from editors.tokens import encode
from harness.data import Dataset
from harness.factfile import Fact
from harness.paths import shown
from harness.scoring import Answer, Prediction, Query, predict, score
from routing import Decision

CONTINUED = 5  # tokens of the unedited model's answer that an unrelated prompt must keep
SAID = 12  # tokens shown of what is answered where a fact did not take
GENERAL = 200  # facts of the embedded set, none of them edited, that stand for general ability
BATCH = 64  # prompts continued together
VIEWS = ("unedited", "edited", "served")
Weights = Callable[[], AbstractContextManager[None]]  # puts one version into the model


@dataclass(frozen=True, kw_only=True)
class Asked:
    """All prompts of a check."""

    facts: Sequence[Fact]  # the ones in force
    general: Sequence[Query]  # statements whose true target should stay the likelier one

    @property
    def queries(self) -> list[Query]:
        """Those with a target, each once."""
        told = [query_of(text, fact) for fact in self.facts for text in (fact.text, *fact.paraphrases)]
        return list(dict.fromkeys([*told, *self.general]))

    @property
    def unrelated(self) -> list[str]:
        """Those whose answer should stay, each once."""
        return list(dict.fromkeys(text for fact in self.facts for text in fact.unrelated))


def query_of(text: str, fact: Fact) -> Query:
    """A text of a fact with its targets."""
    return Query(text, fact.target_new, fact.target_true or fact.target_new)


def general_queries(dataset: Dataset, facts: Sequence[Fact], taken: Sequence[str]) -> list[Query]:
    """The first records of a set that have neither an edited subject nor a prompt of the router's."""
    subjects = {fact.subject for fact in facts}
    left = [
        Query(case.rewrite_prompt, case.request.target_new, case.target_true)
        for case in dataset.cases
        if case.request.subject not in subjects and case.rewrite_prompt not in taken
    ]
    return left[:GENERAL]


def check(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    *,
    unedited: Weights,
    edited: Weights,
    route: Callable[[Sequence[str]], list[Decision]],
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """What check.json holds: a row a fact, and the summary of the three ways to answer."""
    tell = progress or (lambda share: None)
    queries, unrelated = asked.queries, asked.unrelated
    answers: dict[str, dict[Query, Answer]] = {}
    said: dict[str, dict[str, Prediction]] = {}
    with unedited():
        answers["unedited"] = _scored(model, tokenizer, queries)
        tell(0.4)
        texts = continued(model, tokenizer, unrelated, CONTINUED)
        goes_on = [
            (prompt, text if text.strip() else ".") for prompt, text in zip(unrelated, texts, strict=True)
        ]
        said["unedited"] = _predicted(model, tokenizer, goes_on)
    tell(0.5)
    with edited():
        answers["edited"] = _scored(model, tokenizer, queries)
        said["edited"] = _predicted(model, tokenizer, goes_on)
    tell(0.9)
    prompts = list(dict.fromkeys([*(query.prompt for query in queries), *unrelated]))
    decisions = dict(zip(prompts, route(prompts), strict=True)) if prompts else {}

    def seen(view: str, prompt: str) -> str:
        """The weights that answer a prompt in a view."""
        if view != "served":
            return view
        return "unedited" if decisions[prompt].expert is None else "edited"

    def took(view: str, query: Query) -> bool:
        return answers[seen(view, query.prompt)][query].new.argmax

    def kept(view: str, prompt: str) -> bool:
        return said[seen(view, prompt)][prompt].predicted == said["unedited"][prompt].predicted

    rows: list[dict[str, Any]] = []
    for fact in asked.facts:
        query, decision = query_of(fact.text, fact), decisions[fact.text]
        rows.append({
            "id": fact.id, "prompt": fact.text, "target_new": fact.target_new,
            "route": seen("served", fact.text), "score": decision.score,
            "took": took("served", query), "took_edited": took("edited", query),
            "probability": math.exp(-answers[seen("served", fact.text)][query].new.sum_nll),
            "paraphrases": [took("served", query_of(text, fact)) for text in fact.paraphrases],
            "unrelated": [kept("served", text) for text in fact.unrelated],
        })  # fmt: skip
    for version, weights in (("unedited", unedited), ("edited", edited)):
        failed = [row for row in rows if not row["took"] and row["route"] == version]
        with weights():
            texts = continued(model, tokenizer, [row["prompt"] for row in failed], SAID)
        for row, text in zip(failed, texts, strict=True):
            row["answer"] = text
    tell(1.0)
    summary = {
        view: {
            "took": [took(view, query_of(fact.text, fact)) for fact in asked.facts],
            "paraphrases": [
                took(view, query_of(text, fact)) for fact in asked.facts for text in fact.paraphrases
            ],
            "unrelated": [kept(view, text) for text in unrelated],
            "general": [
                answers[seen(view, q.prompt)][q].true.nll < answers[seen(view, q.prompt)][q].new.nll
                for q in asked.general
            ],
        }
        for view in VIEWS
    }
    nll = {view: [answers[seen(view, q.prompt)][q].true.nll for q in asked.general] for view in VIEWS}
    return {
        "facts": rows,
        "summary": {
            view: {name: [sum(found), len(found)] for name, found in row.items()}
            | {"general_perplexity": math.exp(sum(nll[view]) / len(nll[view])) if nll[view] else None}
            for view, row in summary.items()
        },
    }


def _scored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, queries: Sequence[Query]
) -> dict[Query, Answer]:
    return dict(zip(queries, score(model, tokenizer, queries), strict=True)) if queries else {}


def _predicted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> dict[str, Prediction]:
    """The most likely tokens along the unedited model's answer, by prompt."""
    found = predict(model, tokenizer, pairs) if pairs else []
    return {prompt: one for (prompt, _), one in zip(pairs, found, strict=True)}


@torch.no_grad()
def continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int
) -> list[str]:
    """What a model adds greedily to each prompt, up to so many tokens; prompts of equal length together."""
    rows = {prompt: encode(tokenizer, prompt) for prompt in prompts}
    found: dict[str, str] = {}
    for _, same in groupby(sorted(rows, key=lambda prompt: len(rows[prompt])), lambda p: len(rows[p])):
        for part in _parts(list(same)):
            ids = torch.tensor([rows[prompt] for prompt in part], device=device_of(model))
            out = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            added = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            found |= zip(part, added, strict=True)
    return [found[prompt] for prompt in prompts]


def _parts(prompts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(prompts), BATCH):
        yield prompts[start : start + BATCH]


# -- as a text ----------------------------------------------------------------------------------------------

COLUMNS = {
    "took": "facts that took", "paraphrases": "paraphrases", "unrelated": "unrelated prompts as before",
    "general": "other facts known", "general_perplexity": "their perplexity",
}  # fmt: skip
NAMES = {"unedited": "unedited model", "edited": "edited weights alone", "served": "with the router"}


def to_markdown(found: Mapping[str, Any]) -> str:
    """The summary as a table, and the facts that did not take."""
    from tabulate import tabulate

    lines = [
        tabulate(
            [
                [NAMES[view], *(shown_figure(found["summary"][view][name]) for name in COLUMNS)]
                for view in VIEWS
            ],
            ("", *COLUMNS.values()),
            tablefmt="pipe",
            colalign=("left", *["right"] * len(COLUMNS)),
            disable_numparse=True,
        )
    ]
    failed = [row for row in found["facts"] if not row["took"]]
    if failed:
        lines += ["", f"Not taken, {len(failed)} of {len(found['facts'])}:", ""]
        for row in failed:
            where = "" if row["route"] == "edited" else ", sent to the unedited model"
            lines.append(
                f"- {row['id']}: {shown(row['prompt'])} should be answered {shown(row['target_new'])} "
                f"({100 * row['probability']:.2g} %), is {shown(row['answer'].strip())}{where}"
            )
    return "\n".join(lines)


def shown_figure(value: Any) -> str:
    """A figure of the summary as a reader sees it."""
    if isinstance(value, list):
        right, of = value
        return f"{right} of {of}" if of else "–"
    return "–" if value is None else f"{value:.4g}"
