"""Free texts after an edit: seeded sampling with a cache, and the figures taken from them (ALGORITHMS 8.1).

Every text has a random stream of its own, drawn from the seed and its name. So it depends on neither the
batch it was sampled in nor on what else was asked, and two weight sets meet the same draws.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from editors.capture import head_logits
from editors.sites import device_of
from editors.tokens import encode
from harness.data import EditCase, prompt_rows
from harness.paths import read_lines, shown

TEXT_TOKENS = 100  # of a text, its prompt included
TOP_K = 5
PASS_ROWS = 128  # texts sampled together
NGRAM_WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # of the entropies of bigrams and trigrams in fluency


@torch.no_grad()
def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, str],
    *,
    seed: int,
    tokens: int = TEXT_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """One continuation of each prompt, in their order: top 5, temperature 1, ``tokens`` with the prompt.

    prompts: name of the text, which picks its random stream -> prompt.

    As in the reference code the end-of-text token does not end a text; special tokens are left out of
    what is returned. A prompt of that length or more is returned as it is.
    """
    names = list(prompts)
    rows = [encode(tokenizer, prompts[name]) for name in names]
    texts = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for done in range(0, len(order), PASS_ROWS):
        part = order[done : done + PASS_ROWS]
        draws = torch.stack([_draws(names[i], seed, tokens) for i in part])
        for i, row in zip(part, _continued(model, [rows[i] for i in part], draws), strict=True):
            texts[i] = str(tokenizer.decode(row, skip_special_tokens=True))
        if progress:
            progress(done + len(part), len(rows))
    return texts


def _draws(name: str, seed: int, tokens: int) -> Tensor:
    """Uniform numbers (tokens,), float64, of one text."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(tokens, generator=generator, dtype=torch.float64)


def _continued(model: PreTrainedModel, rows: Sequence[list[int]], draws: Tensor) -> list[list[int]]:
    """The rows, each going on to as many tokens as ``draws`` (rows, tokens) has columns.

    All rows go forward a token at a time from the end of the shortest, longer ones along their own prompt
    until that ends. So all are of one length at any time, and nothing is ever padded.
    """
    device = device_of(model)
    tokens = draws.shape[1]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), max(tokens, int(lengths.max())), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    ids, draws, lengths = ids.to(device), draws.to(device), lengths.to(device)
    kept = DynamicCache()
    first = int(lengths.min())
    new = ids[:, :first]
    for place in range(first, tokens):
        out = model.base_model(input_ids=new, past_key_values=kept, use_cache=True)
        chosen = _sampled(head_logits(model, out.last_hidden_state[:, -1]), draws[:, place])
        ids[:, place] = torch.where(place < lengths, ids[:, place], chosen)
        new = ids[:, place : place + 1]
    ends = lengths.clamp(min=tokens).tolist()
    return [row[:end] for row, end in zip(ids.tolist(), ends, strict=True)]


def _sampled(logits: Tensor, draws: Tensor) -> Tensor:
    """(rows,) the token among the TOP_K likeliest at which their summed probability passes the draw."""
    top = logits.topk(min(TOP_K, logits.shape[1]), dim=1)
    passed = top.values.double().softmax(dim=1).cumsum(dim=1) <= draws[:, None]
    choice = passed.sum(dim=1).clamp(max=top.indices.shape[1] - 1)
    return top.indices.gather(1, choice[:, None]).squeeze(1)


@cache
def _tokenizers() -> tuple[Any, Any]:
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return PunktSentenceTokenizer(), NLTKWordTokenizer()


def words(text: str) -> list[str]:
    """Words as ``nltk.word_tokenize`` splits them, but with a sentence splitter that knows no abbreviations.

    The trained one has to be downloaded; the two differ after an abbreviation only.
    """
    sentences, splitter = _tokenizers()
    return [word for sentence in sentences.tokenize(text) for word in splitter.tokenize(sentence)]


def ngram_entropy(tokens: Sequence[str], n: int) -> float:
    """Shannon entropy in bits of the n-gram frequencies; 0 for fewer than n tokens."""
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values())


@cache
def fluency(text: str) -> float:
    """Weighted mean of bigram and trigram entropy of one text, in bits."""
    tokens = words(text)
    return sum(w * ngram_entropy(tokens, n) for n, w in NGRAM_WEIGHTS.items()) / len(NGRAM_WEIGHTS)


class Consistency:
    """Cosine of TF-IDF vectors of a record's texts, joined, and of the reference texts for its new target.

    references: case_id -> texts. The vectoriser is fitted on all of them: the published vocabulary is not
    to be had, so figures are comparable among runs with the same records and references only.
    """

    def __init__(self, references: Mapping[Any, Sequence[str]]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.references = {case: " ".join(texts) for case, texts in references.items()}
        try:
            self._vectoriser = TfidfVectorizer().fit(sorted(set(self.references.values())))
        except ValueError:
            raise ValueError("their texts have no words; correct the file, or leave it out") from None

    def __call__(self, case_id: Any, texts: Sequence[str]) -> float | None:
        """The cosine; None if the record has no references."""
        if case_id not in self.references:
            return None
        vectors = self._vectoriser.transform([" ".join(texts), self.references[case_id]])
        return float((vectors[0] @ vectors[1].T).toarray()[0, 0])  # rows are of length one


def load_references(path: str, cases: Sequence[EditCase]) -> Consistency:
    """Reference texts of records from a file in the form of ROME's ``attribute_snippets.json``.

    A JSON list, or JSON lines, of {relation_id, target_id, samples: [{text}]}. Raises ValueError if it
    cannot be read or has none for these records.
    """
    wanted = {(case.relation_id, case.target_id) for case in cases if case.relation_id and case.target_id}
    found: dict[tuple[str, str], list[str]] = {}
    for number, entry in enumerate(read_lines(Path(path)), start=1):
        try:
            key = (entry["relation_id"], entry["target_id"])
            texts = [sample["text"] for sample in entry["samples"]]
            wrong = [value for value in (*key, *texts) if not isinstance(value, str)]
        except (KeyError, TypeError):
            raise ValueError(
                f"references {path!r}, record {number}: it needs relation_id, target_id and samples with text"
            ) from None
        if wrong:
            raise ValueError(f"references {path!r}, record {number}: {shown(wrong[0])} is not a text")
        if key in wanted and texts:
            found.setdefault(key, []).extend(texts)
    named = {case.case_id: found.get((case.relation_id or "", case.target_id or "")) for case in cases}
    references = {case_id: texts for case_id, texts in named.items() if texts}
    if not references:
        raise ValueError(
            f"references {path!r} have no text for any relation and target of these records; leave them out"
        )
    try:
        return Consistency(references)
    except ValueError as error:
        raise ValueError(f"references {path!r}: {error}") from None


def text_rows(batches: Sequence[Sequence[EditCase]], most: int | None = None) -> Iterator[dict[str, Any]]:
    """What names every generation prompt in ``cases.jsonl.gz``; repeated ones are sampled again.

    most: prompts of a record, its first ones; None: all.
    """
    for row, _ in prompt_rows(batches, lambda case: {"generation": case.generation_prompts[:most]}):
        yield row


def measured(
    rows: Sequence[Mapping[str, Any]], consistency: Consistency | None
) -> dict[str, dict[Any, float]]:
    """Metric -> case_id -> value of generated texts: fluency in bits, consistency where there are references.

    rows: of ``cases.jsonl.gz``; those of other kinds are passed over.
    """
    texts: dict[Any, list[str]] = {}
    for row in rows:
        if row["kind"] == "generation":
            texts.setdefault(row["case_id"], []).append(row["text"])
    measures = {"fluency": {case: _mean(map(fluency, own)) for case, own in texts.items()}}
    if consistency is not None:
        cosines = {case: consistency(case, own) for case, own in texts.items()}
        measures["consistency"] = {case: value for case, value in cosines.items() if value is not None}
    return {metric: values for metric, values in measures.items() if values}


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept)
