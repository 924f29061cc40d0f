"""Target values, keys, covariances and solves: together, against one edit or one layer at a time."""

import statistics

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.measure import Result, agreement, apart, between, compared, each, repeated, shown
from benchmarks.subjects import OWN_TEXT, Subject, random_covariance, spread
from editors.contexts import BARE, Contexts
from editors.linalg import cholesky, solve_with_keys
from editors.rows import SubjectRows
from editors.targets import Passes, Targets, optimise_targets
from harness.stats import gather_covariances, read_texts

COVARIANCE_WEIGHT = 15_000.0
TEXT_TOKENS = 256  # as the texts are long


def targets(subject: Subject, repeats: int, *, edits: int, alone: int) -> list[Result]:
    """Target values of many edits together, against one after the other with full forwards."""
    config, tokenizer = subject.config, subject.tokenizer
    requests = subject.requests(edits)
    places = spread(subject.cases[:edits], alone)

    def together(some: int) -> Targets:
        return optimise_targets(
            subject.fast, tokenizer, requests[:some], subject.contexts, config, passes=_passes(subject)
        )

    def one(place: int) -> reference.TargetResult:
        return reference.target_value(
            subject.plain, tokenizer, requests[place], subject.groups, layer=config.layers[-1],
            steps=config.steps, lr=config.learning_rate, clamp=config.clamp_norm_factor,
            kl=config.kl_factor, decay=config.weight_decay,
        )  # fmt: skip

    together(5)
    one(places[0])
    slow, found = each(one, places)
    fast, made = each(together, [edits] * repeats)
    losses = torch.tensor([result.losses[0] for result in found], dtype=torch.float64)
    first = agreement(
        "first losses", apart(made[-1].first_loss[torch.tensor(places)], losses), subject.precision
    )
    steps = [len(result.losses) for result in found]
    setting = (
        f"{subject.name}, {edits} edits of {subject.data}, {config.steps} steps at most; baseline: median of "
        f"{alone} edits one by one, {min(steps)} to {max(steps)} steps, {between(slow, 's')}; {first}"
    )
    per_edit = [time / edits for time in fast]
    return [compared("targets", "s/edit", subject.device, per_edit, slow, setting)]


def _passes(subject: Subject) -> Passes:
    """As the harness has it: fixed on a CPU, by free memory on a GPU."""
    if subject.device.type != "cuda":
        return Passes()
    return Passes.fitting(subject.fast, torch.cuda.mem_get_info()[0])


def keys(subject: Subject, repeats: int, *, edits: int, alone: int) -> list[Result]:
    """Keys and states of all edited layers for one batch, against text by text, layer by layer."""
    layers, tokenizer = subject.config.layers, subject.tokenizer
    requests = subject.requests(edits)
    places = spread(subject.cases[:edits], alone)

    def together() -> Tensor:
        """(layers * (d_in + d_out), n)."""
        walked = [
            SubjectRows(subject.fast, tokenizer, requests, contexts, layers[0])
            for contexts in (subject.contexts, Contexts(((BARE,),)))
        ]
        found: list[Tensor] = []
        for layer in layers:
            for rows in walked:
                rows.advance(layer)
            found += [walked[0].keys(), walked[1].states(layers[-1])]
        return torch.cat(found)

    def one(place: int) -> Tensor:
        some: list[Tensor] = []
        for layer in layers:
            request = [requests[place]]
            some.append(reference.keys(subject.plain, tokenizer, request, subject.groups, layer))
            some.append(reference.block_states(subject.plain, tokenizer, request, layers[-1]))
        return torch.cat(some)

    many = together()
    one(places[0])
    slow, columns = each(one, places)
    fast = repeated(together, repeats)
    same = agreement("keys and states", apart(many[:, places], torch.cat(columns, 1)), subject.precision)
    setting = (
        f"{subject.name}, one batch of {edits} edits of {subject.data}, layers {subject.span}, "
        f"{len(subject.contexts.templates)} templates; baseline: median of {alone} edits, one text and one "
        f"layer at a time, {between(slow, 'ms')}; {same}"
    )
    per_edit = [time / edits for time in fast]
    return [compared("keys", "ms/edit", subject.device, per_edit, slow, setting)]


def covariance(subject: Subject, repeats: int, *, texts: int) -> list[Result]:
    """Second moments of all edited layers in one pass, against a pass of full forwards for each layer."""
    layers, tokenizer = subject.config.layers, subject.tokenizer
    corpus = read_texts(str(OWN_TEXT))[:texts]
    tokens: list[int] = []

    def together() -> dict[int, Tensor]:
        found = gather_covariances(
            subject.fast, tokenizer, layers, corpus, limit=None, max_length=TEXT_TOKENS,
            progress=lambda done, total: None,
        )  # fmt: skip
        tokens.append(found[layers[0]].tokens)
        return {layer: covariance.matrix for layer, covariance in found.items()}

    def one(layer: int) -> Tensor:
        return reference.covariance(subject.plain, tokenizer, corpus, layer, TEXT_TOKENS).cpu()

    many = together()
    reference.covariance(subject.plain, tokenizer, corpus[:1], layers[0], TEXT_TOKENS)
    passes, moments = each(one, layers)
    fast = repeated(together, repeats)
    difference = max(apart(many[layer], moment) for layer, moment in zip(layers, moments, strict=True))
    setting = (
        f"{subject.name}, layers {subject.span} of {subject.plain.config.num_hidden_layers}, {tokens[-1]:,} "
        f"tokens of SmolLM2's own text; baseline: for each layer a pass of full forwards with the head, text "
        f"by text ({len(layers)} times the median of {len(layers)} passes); "
        f"{agreement('second moments', difference, subject.precision)}"
    )
    slow = [len(layers) * statistics.median(passes)]
    return [compared("covariance", "s", subject.device, fast, slow, setting)]


def solve(repeats: int, *, d_in: int, n: int, device: str) -> list[Result]:
    """(lambda C + K K^T)^-1 K of a batch by Woodbury on a kept factor, against the dense solve."""
    weighted = COVARIANCE_WEIGHT * random_covariance(d_in, device)
    draw = torch.Generator(device).manual_seed(1)
    batch = torch.randn(d_in, n, generator=draw, device=device)

    def direct() -> Tensor:
        many = batch.double()
        solution: Tensor = torch.linalg.solve(weighted + many @ many.T, many)
        return solution

    cholesky(weighted[:64, :64])
    (once,), (factor,) = each(cholesky, [weighted])
    same = agreement("solutions", apart(solve_with_keys(factor, batch), direct()), 1e-8)
    fast = repeated(lambda: solve_with_keys(factor, batch), repeats)
    slow = repeated(direct, repeats)
    setting = (
        f"d_in {d_in:,}, {n} keys, float64; the factor is made once a layer ({shown(1000 * once)} ms, not "
        f"counted); baseline: the dense system made and solved; {same}"
    )
    return [compared("solve", "ms", batch.device, fast, slow, setting)]
