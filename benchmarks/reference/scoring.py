"""Scores of one prompt, and rates from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.reference.models import frozen, full_precision
from benchmarks.reference.tokens import encode, filled, padded, target_ids


@dataclass(frozen=True)
class Likelihood:
    """How a model predicts one continuation under teacher forcing."""

    nll: float  # mean per token
    sum_nll: float
    right: tuple[bool, ...]  # for each token, whether it is the most likely one

    @property
    def argmax(self) -> bool:
        """Every token is the most likely one."""
        return all(self.right)


@torch.no_grad()
def likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, target: str
) -> Likelihood:
    """Score one prompt and one target; token j of the target is read at ``len(prompt_ids) + j - 1``."""
    prompt_ids = encode(tokenizer, prompt)
    ids = target_ids(tokenizer, target)
    with frozen(model):
        logits = model(torch.tensor([prompt_ids + ids], device=model.device), use_cache=False).logits[0]
    log_p = torch.log_softmax(full_precision(logits), dim=-1)
    places = [len(prompt_ids) + j - 1 for j in range(len(ids))]
    nlls = [-log_p[place, token].item() for place, token in zip(places, ids, strict=True)]
    right = [int(log_p[place].argmax()) == token for place, token in zip(places, ids, strict=True)]
    return Likelihood(math.fsum(nlls) / len(nlls), math.fsum(nlls), tuple(right))


@torch.no_grad()
def record_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], targets: Sequence[str]
) -> list[list[Likelihood]]:
    """Score every prompt of one record with every target in one padded batch, as the reference codes do.

    Logits are taken at every position. Returned by prompt, then by target.
    """
    rows = [
        (encode(tokenizer, prompt), target_ids(tokenizer, target)) for prompt in prompts for target in targets
    ]
    with frozen(model):
        batch = padded(tokenizer, [before + ids for before, ids in rows], model.device)
        logits = model(**batch, use_cache=False).logits
    found: list[Likelihood] = []
    for row, (before, ids) in enumerate(rows):
        places = range(len(before) - 1, len(before) + len(ids) - 1)
        log_p = [torch.log_softmax(full_precision(logits[row, place]), dim=-1) for place in places]
        nlls = [-p[token].item() for p, token in zip(log_p, ids, strict=True)]
        right = [int(p.argmax()) == token for p, token in zip(log_p, ids, strict=True)]
        found.append(Likelihood(math.fsum(nlls) / len(nlls), math.fsum(nlls), tuple(right)))
    return [found[i : i + len(targets)] for i in range(0, len(found), len(targets))]


@torch.no_grad()
def forced_prediction(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> tuple[list[int], list[int]]:
    """Ids of an answer in the text "prompt answer", and the argmax before each of them."""
    start = len(encode(tokenizer, prompt))
    ids = encode(tokenizer, f"{prompt} {answer}")
    with frozen(model):
        logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return ids[start:], [int(logits[place - 1].argmax()) for place in range(start, len(ids))]


def knowedit_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """KnowEdit's metrics from rows of the cases file: mean inside a record, then over those that have it."""
    rates: dict[str, float] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        shares: dict[str, dict[Any, list[float]]] = {}
        for row in rows:
            if row["kind"] == kind:
                name = {"rewrite": "rewrite_acc", "rephrase": "rephrase_acc"}.get(kind, kind)
                right = row["tokens_agreeing" if kind == "relation_specificity" else "tokens_right"]
                shares.setdefault(name, {}).setdefault(row["case_id"], []).append(right / row["tokens"])
                if kind != "relation_specificity":
                    whole = 1.0 if right == row["tokens"] else 0.0
                    shares.setdefault(f"{name}_exact", {}).setdefault(row["case_id"], []).append(whole)
                if "tokens_any" in row:
                    share = row["tokens_right_any"] / row["tokens_any"]
                    shares.setdefault(f"{name}_any", {}).setdefault(row["case_id"], []).append(share)
        for name, records in shares.items():
            rates[name] = math.fsum(math.fsum(some) / len(some) for some in records.values()) / len(records)
    return rates


def score_record(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row per prompt of a CounterFact record, by the names of the cases file."""
    rewrite = record["requested_rewrite"]
    prompts = [("rewrite", 0, filled(rewrite["prompt"], rewrite["subject"]))]
    prompts += [("paraphrase", i, text) for i, text in enumerate(record["paraphrase_prompts"])]
    prompts += [("neighborhood", i, text) for i, text in enumerate(record["neighborhood_prompts"])]
    rows: list[dict[str, Any]] = []
    for kind, index, prompt in prompts:
        row: dict[str, Any] = {"kind": kind, "index": index, "prompt": prompt}
        for which in ("new", "true"):
            found = likelihood(model, tokenizer, prompt, rewrite[f"target_{which}"]["str"])
            row |= {
                f"nll_{which}": found.nll,
                f"sum_nll_{which}": found.sum_nll,
                f"argmax_{which}": found.argmax,
                f"tokens_{which}": len(found.right),
                f"tokens_right_{which}": sum(found.right),
            }
        rows.append(row)
    return rows


def counterfact_rates(records: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Rates from the rows of several records: mean over prompts inside a record, then over records.

    Success is strict; a tie fails. ``score`` is the harmonic mean of the three, zero when one is zero.
    """
    kinds = {"efficacy": "rewrite", "generalization": "paraphrase", "locality": "neighborhood"}
    rates: dict[str, float] = {}
    for metric, kind in kinds.items():
        target, other = ("true", "new") if kind == "neighborhood" else ("new", "true")
        success, argmax, overlap = [], [], []
        for rows in records:
            chosen = [row for row in rows if row["kind"] == kind]
            if chosen:
                won = [row[f"nll_{target}"] < row[f"nll_{other}"] for row in chosen]
                success.append(sum(won) / len(won))
                argmax.append(sum(bool(row[f"argmax_{target}"]) for row in chosen) / len(chosen))
                shares = [row[f"tokens_right_{target}"] / row[f"tokens_{target}"] for row in chosen]
                overlap.append(math.fsum(shares) / len(shares))
        rates[metric] = math.fsum(success) / len(success)
        rates[f"{metric}_argmax"] = math.fsum(argmax) / len(argmax)
        rates[f"{metric}_overlap"] = math.fsum(overlap) / len(overlap)
    three = [rates[metric] for metric in kinds]
    rates["score"] = 3 / math.fsum(1 / rate for rate in three) if all(three) else 0.0
    return rates
