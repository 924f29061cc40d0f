"""Scoring, routing and routed forwards: in batches, against one record, one query, one model."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.measure import Result, agreement, between, compared, each, repeated, shown
from benchmarks.subjects import Subject, prompts, spread
from harness.encoders import encoder
from harness.routed import RoutedModel
from harness.scoring import Query, score
from routing import ROUTERS, Decision

Embed = Callable[[Sequence[str]], Tensor]
SAME_PROBABILITY = 1e-5
SAME_SCORE = 1e-3  # of routing, where the numerical minimum and the embeddings are rounded


def scoring(subject: Subject, repeats: int, *, records: int, alone: int) -> list[Result]:
    """All prompts of many records with both targets, against record by record in a padded batch."""
    cases = subject.cases[:records]
    queries = [
        [
            Query(prompt, case.request.target_new, case.target_true)
            for texts in case.prompts.values()
            for prompt in texts
        ]
        for case in cases
    ]
    every = list(chain(*queries))
    places = spread(cases, alone)

    def together() -> dict[Query, list[float]]:
        """Mean NLL of the new and of the true target."""
        answers = score(subject.fast, subject.tokenizer, every)
        return {query: [a.new.nll, a.true.nll] for query, a in zip(every, answers, strict=True)}

    def one(place: int) -> list[list[float]]:
        pair = (cases[place].request.target_new, cases[place].target_true)
        texts = [query.prompt for query in queries[place]]
        found = reference.record_likelihoods(subject.plain, subject.tokenizer, texts, pair)
        return [[likelihood.nll for likelihood in row] for row in found]

    with subject.released():
        many = together()
        one(places[0])
        slow, found = each(one, places)
        fast = repeated(together, repeats)
    difference = max(
        abs(math.exp(-mine) - math.exp(-other))
        for place, rows in zip(places, found, strict=True)
        for query, row in zip(queries[place], rows, strict=True)
        for mine, other in zip(many[query], row, strict=True)
    )
    most = subject.precision if subject.plain.dtype == torch.bfloat16 else SAME_PROBABILITY
    setting = (
        f"{subject.name}, {records} records of {subject.data}, {len(every):,} prompts with two targets each; "
        f"baseline: median of {alone} records, each in one padded batch of all its rows with logits "
        f"everywhere, {between(slow, 'ms')}; {agreement('probabilities', difference, most)}"
    )
    per_record = [time / records for time in fast]
    return [compared("scoring", "ms/record", subject.device, per_record, slow, setting)]


def router(
    repeats: int,
    *,
    device: str,
    corpus: int = 2000,
    queries: int = 256,
    batch: int = 64,
    alone: int = 64,
    embedder: Callable[[], Embed] | None = None,
) -> list[Result]:
    """Text to decision with nothing cached, in batches, against the same one query at a time."""
    embedder = embedder or (lambda: encoder("minilm", cache=None, device=device))
    texts = prompts()
    needed = corpus + (repeats + 1) * queries
    if len(texts) < needed:
        raise ValueError(f"{needed:,} distinct prompts are needed, there are {len(texts):,}; lower --repeats")
    config, kind = ROUTERS["topk"]
    batched, single = (kind(config(), embedder()) for _ in range(2))
    for made in (batched, single):
        made.add("edited", texts[: corpus // 2])
        made.add(None, texts[corpus // 2 : corpus])
    turns = [texts[start : start + queries] for start in range(corpus, needed, queries)]

    def in_batches(some: Sequence[str]) -> list[Decision]:
        parts = (some[start : start + batch] for start in range(0, len(some), batch))
        return list(chain(*map(batched.route, parts)))

    def one(text: str) -> float:
        score: float = single.route([text])[0].score
        return score

    in_batches(turns[0])
    one(turns[0][0])
    fast, decided = each(in_batches, turns[1:])
    slow, scores = each(one, turns[1][:alone])
    same = agreement("scores", _apart(decided[0], scores), SAME_SCORE)
    setting = (
        f"{getattr(embedder(), 'identity', 'another encoder')}, {queries} texts not seen before in batches "
        f"of {batch}, corpus of {corpus:,} texts; baseline: one query at a time, median of {alone}; {same}"
    )
    per_query = [time / queries for time in fast]
    return [compared("router", "ms/query", torch.device(device), per_query, slow, setting)]


def router_decision(
    repeats: int,
    *,
    device: str,
    vectors: int = 10_000,
    width: int = 384,
    queries: int = 2048,
    batch: int = 64,
    larger: int = 1024,
    alone: int = 100,
) -> list[Result]:
    """The decision on embeddings at hand, in batches, against one product and one sort a query."""
    draw = torch.Generator().manual_seed(0)
    every = torch.randn(vectors + queries, width, generator=draw)
    every[vectors:] += every[:queries]  # each resembles one of the corpus: their cosine is about 0.7
    every = torch.nn.functional.normalize(every, dim=1).to(device)
    names = [str(i) for i in range(vectors + queries)]
    config, kind = ROUTERS["topk"]
    made = kind(config(), lambda texts: every[int(texts[0]) : int(texts[-1]) + 1])  # always in order
    made.add("edited", names[: vectors // 2])
    made.add(None, names[vectors // 2 : vectors])
    corpus, labels = every[:vectors], [1 if i < vectors // 2 else -1 for i in range(vectors)]
    asked = names[vectors:]

    def in_batches(size: int) -> list[Decision]:
        return list(chain(*(made.route(asked[start : start + size]) for start in range(0, queries, size))))

    def one(row: int) -> float:
        return reference.route_by_product(every[vectors + row], corpus, labels, config().top_k)

    in_batches(larger)
    in_batches(batch)
    rough, _ = each(in_batches, [larger] * repeats)
    fast, decided = each(in_batches, [batch] * repeats)
    one(0)
    slow, scores = each(one, range(alone))
    same = agreement("scores", _apart(decided[-1], scores), SAME_SCORE)
    setting = (
        f"{vectors:,} vectors of width {width}, batches of {batch} (of {larger:,}: "
        f"{shown(1e6 * statistics.median(rough) / queries)} us); baseline: a product, a sort and a numerical "
        f"minimum a query, median of {alone}; {same}"
    )
    per_query = [time / queries for time in fast]
    return [compared("router-decision", "us/query", every.device, per_query, slow, setting)]


def _apart(decided: Sequence[Decision], scores: Sequence[float]) -> float:
    """Largest difference of scores, of as many decisions as there are scores."""
    return max(abs(decision.score - score) for decision, score in zip(decided, scores, strict=False))


def routed_forward(subject: Subject, repeats: int, *, rows: int, tokens: int) -> list[Result]:
    """A batch half of which the edited matrices answer, against the same batch by the model alone."""
    model = subject.plain
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(len(subject.tokenizer), (rows, tokens), generator=draw).to(subject.device)
    mixed = [row % 2 == 0 for row in range(rows)]
    mask = torch.tensor(mixed, device=subject.device)

    @torch.no_grad()
    def logits() -> Tensor:
        found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    fast: list[float] = []
    slow: list[float] = []
    with subject.released():
        edited = {name: 1.01 * model.get_parameter(name).detach() for name in subject.edited}
        plain = logits()
        with RoutedModel(model, subject.tokenizer, edited, None) as routed:
            share = _bytes(routed.edited.values()) / _bytes(model.parameters())
            with routed.rows("edited"):
                other = logits()
            with routed.rows(mixed):
                both = logits()
        for _ in range(repeats):  # in turn, so that both meet the same machine
            slow += repeated(logits, 1)
            with RoutedModel(model, subject.tokenizer, edited, None) as routed, routed.rows(mixed):
                fast += repeated(logits, 1)
    if torch.equal(other, plain):
        raise RuntimeError("the edited version answers as the unedited one does")
    if not torch.equal(both, torch.where(mask[:, None, None], other, plain)):
        raise RuntimeError("rows of the mixed batch are not bit for bit those of either version alone")
    setting = (
        f"{subject.name}, {rows} x {tokens} tokens, every other row by the edited version, {len(edited)} "
        f"matrices of it held beside the model ({100 * share:.1f} % more memory); baseline: the model "
        "alone; rows are bit for bit those of either version alone"
    )
    return [compared("routed-forward", "ms", subject.device, fast, slow, setting)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
