"""Generated texts against a literal loop, and the figures taken from them against their definitions."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tiny
from editors.sites import sites_for
from harness import generation
from harness.data import to_case
from harness.generation import (
    Consistency,
    fluency,
    load_references,
    measured,
    ngram_entropy,
    sample_texts,
    text_rows,
    words,
)

PROMPTS = {
    "1/0": "Anna Abel lives in",
    "1/1": "Anna Abel lives in",
    "2/0": "The river runs on and they speak French",
    "3/0": "Rome",
}


def literal(model: Any, tokenizer: Any, name: str, prompt: str, seed: int, tokens: int) -> str:
    """One token after the other, a whole forward for each, one draw compared with the top five by hand."""
    ids = tokenizer(prompt)["input_ids"]
    draws = generation._draws(name, seed, tokens)
    while len(ids) < tokens:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        best = sorted(range(len(logits)), key=lambda token: -logits[token].item())[:5]
        weights = [math.exp(logits[token].item() - logits[best[0]].item()) for token in best]
        left = draws[len(ids)].item() * sum(weights)
        chosen = 0
        while chosen < 4 and left >= weights[chosen]:
            left -= weights[chosen]
            chosen += 1
        ids = [*ids, best[chosen]]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_equals_the_literal_loop_in_any_batch(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny.tiny_model(model_type, dtype=torch.float64)
    norm = model.get_submodule(sites_for(model).final_norm)
    with torch.no_grad():  # tiny models are all but certain of the next token; these are not
        norm.weight.mul_(0.1)
    tokenizer = tiny.tiny_tokenizer(bos=True)
    found = sample_texts(model, tokenizer, PROMPTS, seed=3, tokens=30)
    expected = [literal(model, tokenizer, *item, seed=3, tokens=30) for item in PROMPTS.items()]
    assert found == expected
    assert found[0] != found[1]  # one prompt, two texts
    assert sample_texts(model, tokenizer, {"2/0": PROMPTS["2/0"]}, seed=3, tokens=30) == found[2:3]
    monkeypatch.setattr(generation, "PASS_ROWS", 1)
    assert sample_texts(model, tokenizer, PROMPTS, seed=3, tokens=30) == found
    assert sample_texts(model, tokenizer, PROMPTS, seed=4, tokens=30) != found


def test_texts_are_as_long_as_asked_and_start_with_the_prompt() -> None:
    model, tokenizer = tiny.tiny_model("llama"), tiny.tiny_tokenizer(bos=False)
    told: list[tuple[int, int]] = []
    texts = sample_texts(model, tokenizer, PROMPTS, seed=0, tokens=12, progress=lambda *at: told.append(at))
    for text, prompt in zip(texts, PROMPTS.values(), strict=True):
        assert text.startswith(prompt)
    assert told[-1] == (4, 4)
    long = {"long": PROMPTS["2/0"]}
    assert sample_texts(model, tokenizer, long, seed=0, tokens=3) == list(long.values())


def test_fluency_is_the_weighted_entropy_in_bits() -> None:
    assert ngram_entropy(list("abab"), 1) == 1.0
    assert ngram_entropy(list("aaaa"), 2) == 0.0
    assert ngram_entropy(["a"], 2) == 0.0
    text = "the cat and the dog and the cat and a bird"
    tokens, entropies = text.split(), []
    for n in (2, 3):
        counts = Counter(" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        total = sum(counts.values())
        entropies.append(sum(c / total * math.log2(total / c) for c in counts.values()))
    assert fluency(text) == pytest.approx(entropies[0] / 3 + 2 * entropies[1] / 3)
    assert fluency("la la la la la la") == 0.0


def test_words_are_split_as_nltk_does() -> None:
    assert words("They don't know. It is cold, isn't it?") == [
        "They", "do", "n't", "know", ".", "It", "is", "cold", ",", "is", "n't", "it", "?",
    ]  # fmt: skip


def test_consistency_is_the_cosine_of_tf_idf_vectors() -> None:
    references = {1: ["rome is old", "rome is big"], 2: ["the cello is old"], 3: ["a cat"]}
    consistency = Consistency(references)
    documents = [" ".join(texts).split() for texts in references.values()]
    vocabulary = sorted({word for document in documents for word in document if len(word) > 1})
    inverse = {w: math.log((1 + 3) / (1 + sum(w in d for d in documents))) + 1 for w in vocabulary}

    def vector(tokens: list[str]) -> list[float]:
        return [tokens.count(word) * inverse[word] for word in vocabulary]

    mine, theirs = vector(["rome", "is", "the", "old", "cello", "rome"]), vector(documents[0])
    cosine = sum(a * b for a, b in zip(mine, theirs, strict=True)) / math.hypot(*mine) / math.hypot(*theirs)
    assert consistency(1, ["rome is the old", "cello rome"]) == pytest.approx(cosine)
    assert consistency(9, ["rome"]) is None


def references_file(path: Path, entries: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(entries))
    return str(path)


def test_references_are_matched_by_relation_and_target(tmp_path: Path) -> None:
    records = tiny.tiny_records(3)
    for i, record in enumerate(records):
        record["requested_rewrite"] |= {"relation_id": f"P{i % 2}"}
        record["requested_rewrite"]["target_new"]["id"] = f"Q{i}"
    cases = [to_case(record, i) for i, record in enumerate(records)]
    entries = [
        {"relation_id": "P0", "target_id": "Q0", "samples": [{"text": "one"}, {"text": "two"}]},
        {"relation_id": "P1", "target_id": "Q0", "samples": [{"text": "of another relation"}]},
        {"relation_id": "P0", "target_id": "Q2", "samples": [{"text": "three"}]},
    ]
    found = load_references(references_file(tmp_path / "snippets.json", entries), cases)
    assert found.references == {cases[0].case_id: "one two", cases[2].case_id: "three"}
    with pytest.raises(ValueError, match="leave them out"):
        load_references(references_file(tmp_path / "other.json", entries[1:2]), cases)
    with pytest.raises(ValueError, match=r"record 1.*samples"):
        load_references(references_file(tmp_path / "wrong.json", [{"relation_id": "P0"}]), cases)


def test_rows_and_measures() -> None:
    records = tiny.tiny_records(2)
    for record in records:
        record["generation_prompts"] = ["Rome is", "Rome is", "Oslo is"]
    cases = [to_case(record, i) for i, record in enumerate(records)]
    rows = list(text_rows([cases[:1], cases[1:]]))
    assert [(row["batch"], row["index"], row["prompt"]) for row in rows[:3]] == [
        (1, 0, "Rome is"), (1, 1, "Rome is"), (1, 2, "Oslo is"),
    ]  # fmt: skip
    texts = ["a b a b a c", "d e f", "a b c d e", "b b b b", "x y z w", "a a a b"]
    shown = [row | {"text": text} for row, text in zip(rows, texts, strict=True)]
    found = measured([*shown, {"kind": "rewrite", "case_id": 5}], None)
    assert list(found) == ["fluency"]
    assert found["fluency"][cases[0].case_id] == pytest.approx(sum(map(fluency, texts[:3])) / 3)
