"""Scores of one answer and of many, as lm-eval calls them.

Two readings of the same prompts, as in the code that SeqMMR's figures come from: the likelier of the given
answers, and the answer searched in five generated tokens.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

INVALID = -1  # class of a generated text without any answer
Answers = Sequence[tuple[str, int]]  # (what is searched, its class), in order of search


def from_choices(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Metrics of one record from the log-probability of each choice; of equal ones the first wins."""
    logprobs = [logprob for logprob, _ in results]
    gold, pred = doc["label"], logprobs.index(max(logprobs))
    return {
        "f1_weighted": (gold, pred),
        "f1_macro": (gold, pred),
        "acc": float(pred == gold),
        "gold_margin": gold_margin(logprobs, gold),
    }


def gold_margin(logprobs: Sequence[float], gold: int) -> float:
    """By how much the right choice is likelier than the best of the others, nats."""
    return logprobs[gold] - max(logprob for i, logprob in enumerate(logprobs) if i != gold)


def read_answer(text: str, answers: Answers) -> int:
    """Class of the first answer that occurs in a text, whatever its case; INVALID if none does."""
    lowered = text.lower()
    return next((label for word, label in answers if word in lowered), INVALID)


def _generated(doc: Mapping[str, Any], results: Sequence[str], answers: Answers) -> dict[str, Any]:
    pred = read_answer(results[0], answers)
    return {"f1_generated": (doc["label"], pred), "invalid": float(pred == INVALID)}


def generated_sst(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Positive is searched first."""
    return _generated(doc, results, (("positive", 1), ("negative", 0)))


def generated_mrpc(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Yes is searched first."""
    return _generated(doc, results, (("yes", 1), ("no", 0)))


def generated_cola(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Yes is searched first."""
    return _generated(doc, results, (("yes", 1), ("no", 0)))


def generated_rte(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """False is searched first; label 0 is entailment."""
    return _generated(doc, results, (("false", 1), ("true", 0)))


def generated_rte_legacy(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """False is searched first, and stands for label 0, which means entailment."""
    return _generated(doc, results, (("false", 0), ("true", 1)))


def generated_nli(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """True is searched first; label 1 is entailment."""
    return _generated(doc, results, (("true", 1), ("false", 0)))


def generated_mmlu(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """A letter counts only at the end of a line."""
    return _generated(doc, results, tuple((f"{letter}\n", label) for label, letter in enumerate("abcd")))


def f1_weighted(items: Sequence[tuple[int, int]]) -> float:
    """F1 of each class, weighted by how often it is right; items: (gold, pred)."""
    support = Counter(gold for gold, _ in items)
    return sum(count * _f1(items, label) for label, count in support.items()) / len(items)


def f1_macro(items: Sequence[tuple[int, int]]) -> float:
    """Mean F1 of the classes that are right or predicted somewhere; items: (gold, pred)."""
    classes = {label for item in items for label in item}
    return sum(_f1(items, label) for label in classes) / len(classes)


def _f1(items: Sequence[tuple[int, int]], label: int) -> float:
    right = sum(gold == pred == label for gold, pred in items)
    return 2 * right / sum((gold == label) + (pred == label) for gold, pred in items)
