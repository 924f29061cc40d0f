"""Likelihoods of two targets after one prompt, against one full forward a target."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import reference
from benchmarks.tiny import MODEL_TYPES, tiny_model, tiny_records, tiny_tokenizer
from editors.tokens import encode, target_ids
from harness import scoring
from harness.scoring import Answer, Query, predict, score


def make_queries(n: int = 4) -> list[Query]:
    """Prompts of several lengths; targets of one to several tokens, in both places."""
    queries = []
    for record in tiny_records(n):
        rewrite = record["requested_rewrite"]
        new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
        prompts = [rewrite["prompt"].format(rewrite["subject"]), *record["paraphrase_prompts"]]
        queries += [Query(prompt, new, true) for prompt in prompts]
    prompt = queries[0].prompt
    queries += [
        Query(prompt, "Rome", "the old town"),
        Query(prompt, "the old town", "Rome"),
        Query(prompt, " Rome", "cello"),  # a leading space is not doubled
        Query(prompt, "Rome in Lima", "Dutch and Latin"),
        Query("A", "Oslo", "Malmö Zürich Santiago"),
    ]
    return queries


def expected(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, query: Query) -> Answer:
    new, true = (
        scoring.Likelihood(found.nll, found.sum_nll, len(found.right), sum(found.right))
        for found in (
            reference.likelihood(model, tokenizer, query.prompt, target)
            for target in (query.target_new, query.target_true)
        )
    )
    return Answer(new=new, true=true)


def assert_equal(found: list[Answer], wanted: list[Answer], tolerance: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        for mine, theirs in ((one.new, other.new), (one.true, other.true)):
            assert mine.nll == pytest.approx(theirs.nll, rel=tolerance, abs=tolerance)
            assert mine.sum_nll == pytest.approx(theirs.sum_nll, rel=tolerance, abs=tolerance)
            assert (mine.tokens, mine.tokens_right) == (theirs.tokens, theirs.tokens_right)
            assert mine.argmax is theirs.argmax


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_scores_equal_one_forward_a_target(model_type: str, bos: bool) -> None:
    model, tokenizer = tiny_model(model_type, dtype=torch.float64), tiny_tokenizer(bos=bos)
    queries = make_queries()
    lengths = {len(target_ids(tokenizer, t)) for q in queries for t in (q.target_new, q.target_true)}
    assert {1, 3} <= lengths
    assert_equal(score(model, tokenizer, queries), [expected(model, tokenizer, q) for q in queries], 1e-9)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_float32_scores_are_equal_to_rounding(model_type: str) -> None:
    model, tokenizer = tiny_model(model_type), tiny_tokenizer(bos=True)
    queries = make_queries()
    assert_equal(score(model, tokenizer, queries), [expected(model, tokenizer, q) for q in queries], 1e-5)


def test_half_precision_models_are_scored_in_float32() -> None:
    model, tokenizer = tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer(bos=True)
    queries = make_queries(2)
    values = [a.new.nll for a in score(model, tokenizer, queries)]
    halves = torch.tensor(values).bfloat16().float().tolist()
    assert values != pytest.approx(halves, rel=1e-6)  # more digits than bfloat16 has
    wanted = [expected(model, tokenizer, q).new.nll for q in queries]
    assert values == pytest.approx(wanted, rel=0.05)


def test_the_mean_is_over_the_targets_own_tokens() -> None:
    model, tokenizer = tiny_model("gpt2", dtype=torch.float64), tiny_tokenizer(bos=True)
    (answer,) = score(model, tokenizer, [Query("In the old town", "Rome in Lima", "Rome")])
    assert answer.new.sum_nll == pytest.approx(3 * answer.new.nll, rel=1e-12)
    assert answer.true.sum_nll == answer.true.nll


def test_argmax_needs_every_token() -> None:
    """Targets made of the model's own choices, one token of which is then exchanged."""
    model, tokenizer = tiny_model("gpt2", dtype=torch.float64), tiny_tokenizer(bos=True)
    targets = {t: ids for t in _texts(tokenizer) if len(ids := target_ids(tokenizer, t)) == 2}
    outcomes = set()
    for prompt in (q.prompt for q in make_queries()):
        for answer in score(model, tokenizer, [Query(prompt, t, "Rome") for t in targets]):
            outcomes.add(answer.new.argmax)
    assert outcomes == {False}  # a random model says none of them by chance
    prompt = "In the old town"
    ids = encode(tokenizer, prompt)
    for _ in range(2):
        logits = model(torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
    likely = ids[-2:]
    wrong = [likely[0], (likely[1] + 1) % 300]
    for which, target, right in (("right", likely, True), ("wrong", wrong, False)):
        found = scoring._score_batch(model, [ids[:-2]], [(target, target[:1])])[0]
        assert found.new.argmax is right, which
        assert found.true.argmax is True, which


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_argmax_is_what_greedy_generation_writes(model_type: str) -> None:
    """Free generation, stopped at the target's length, writes it if and only if all of it is the argmax."""
    model, tokenizer = tiny_model(model_type, dtype=torch.float64), tiny_tokenizer(bos=True)
    outcomes = []
    for prompt in dict.fromkeys(q.prompt for q in make_queries()):
        ids = torch.tensor([encode(tokenizer, prompt)])
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, eos_token_id=-1
        )
        said = written[0, ids.shape[1] :].tolist()
        other = (said[0] + said[1] + 1) % 300
        for target in (said, said[:1], [said[0], other, said[2]], [other, *said[1:]]):
            found = scoring._score_batch(model, ids.tolist(), [(target, said)])[0]
            assert found.new.argmax is (target == said[: len(target)])
            assert found.true.argmax is True
            outcomes.append(found.new.argmax)
    assert set(outcomes) == {True, False}


def _texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return ["French cello", "Dutch piano", "Latin chess", "the town", "old Rome"]


def test_order_is_kept_and_equal_queries_are_computed_once() -> None:
    model, tokenizer = tiny_model("llama", dtype=torch.float64), tiny_tokenizer(bos=True)
    queries = make_queries()
    mixed = [*queries[::-1], queries[3], queries[0], queries[3]]
    rows: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _out: rows.append(args[0].shape[0])
    )
    found = score(model, tokenizer, mixed)
    twice = sum(rows)
    rows.clear()
    alone = score(model, tokenizer, queries)
    handle.remove()
    assert sum(rows) == twice
    assert_equal(found, [*alone[::-1], alone[3], alone[0], alone[3]], 1e-12)
    assert found[-3] == found[-1] == found[len(queries) - 4]


@pytest.mark.parametrize("tokens", [1, 40, 100_000])
def test_the_size_of_a_pass_changes_nothing(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    model, tokenizer = tiny_model("qwen2", dtype=torch.float64), tiny_tokenizer(bos=False)
    queries = make_queries()
    usual = score(model, tokenizer, queries)
    shapes: list[tuple[int, ...]] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _out: shapes.append(tuple(args[0].shape))
    )
    monkeypatch.setattr(scoring, "PASS_TOKENS", tokens)
    found = score(model, tokenizer, queries)
    handle.remove()
    assert_equal(found, usual, 1e-12)
    if tokens == 1:
        assert max(rows for rows, _ in shapes) <= 2  # one prompt, its two targets


def test_progress_ends_at_the_number_of_distinct_queries() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(bos=True)
    queries = make_queries(2)
    told: list[tuple[int, int]] = []
    score(model, tokenizer, [*queries, *queries], progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(queries), len(queries))
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_no_queries_give_no_answers() -> None:
    assert score(tiny_model("gpt2"), tiny_tokenizer(bos=True), []) == []


def test_scoring_leaves_no_gradients_and_no_changes() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(bos=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.requires_grad_(True)
    score(model, tokenizer, make_queries(1))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_prompts_that_do_not_fit_the_device_together_are_scored_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = tiny_model("gpt2", dtype=torch.float64), tiny_tokenizer(bos=False)
    queries = [
        Query(f"Anna Abel plays {word}", "the cello", "chess") for word in ("a", "the", "in", "to", "old")
    ]
    asked = [(query.prompt, query.target_new) for query in queries]
    whole, forced = score(model, tokenizer, queries), predict(model, tokenizer, asked)
    plain, sizes = scoring._target_states, []

    def limited(model: Any, prompts: Any, targets: Any) -> Any:
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(prompts))
        return plain(model, prompts, targets)

    monkeypatch.setattr(scoring, "_target_states", limited)
    for one, other in zip(score(model, tokenizer, queries), whole, strict=True):
        assert one.new.nll == pytest.approx(other.new.nll, abs=1e-9)
    assert predict(model, tokenizer, asked) == forced
    assert max(sizes) == 2
    monkeypatch.setattr(scoring, "_target_states", lambda *_: limited(None, [1, 2, 3], None))
    with pytest.raises(MemoryError, match="one row more"):
        score(model, tokenizer, queries)
