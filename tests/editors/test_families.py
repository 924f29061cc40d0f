"""Every architecture of the table: targets as the one-by-one loop has them, edits that take and come off."""

import pytest
import torch
from torch import Tensor

from benchmarks import reference, tiny
from editors import EDITORS, EditRequest, dense
from editors.contexts import Contexts
from editors.sites import sites_for
from editors.targets import TargetConfig, optimise_targets
from harness.models import edit_in_float32
from harness.scoring import Query, score

CONTEXTS = Contexts(tuple(tuple(group) for group in tiny.TEMPLATES))
LAYERS = (1, 2, 3)
# Nothing holds the vector back: a tiny model's hidden states are short, so the usual decay is heavy.
# The subject ends the prompt, so the edited state itself predicts the target.
REQUEST = EditRequest(case_id=1, prompt="They went with {}", subject="Anna Abel", target_new="Rome")
SETTINGS = {
    "steps": 20,
    "covariance_weight": 1.0,
    "clamp_norm_factor": 6.0,
    "weight_decay": 1e-3,
    "kl_factor": 0.0,
}


def covariance(layer: int) -> Tensor:
    return 1e-3 * torch.eye(48, dtype=torch.float64)


def nll(model, tokenizer) -> float:  # type: ignore[no-untyped-def]
    prompt = REQUEST.prompt.replace("{}", REQUEST.subject)
    return score(model, tokenizer, [Query(prompt, REQUEST.target_new, "Oslo")])[0].new.nll


@pytest.mark.parametrize("model_type", tiny.OTHER_TYPES)
def test_targets_equal_the_one_by_one_loop(model_type: str) -> None:
    model, tokenizer = tiny.tiny_model(model_type, dtype=torch.float64), tiny.tiny_tokenizer(bos=True)
    requests = tiny.tiny_requests(3)
    together = optimise_targets(model, tokenizer, requests, CONTEXTS, TargetConfig(layers=(2,), steps=6))
    for i, request in enumerate(requests):
        alone = reference.target_value(
            model, tokenizer, request, tiny.TEMPLATES, layer=2, steps=6, lr=0.5, clamp=0.75
        )
        torch.testing.assert_close(together.values[i], alone.z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_an_edit_takes_and_comes_off(model_type: str, dtype: torch.dtype) -> None:
    model, tokenizer = tiny.tiny_model(model_type, dtype=dtype), tiny.tiny_tokenizer(bos=False)
    names = [sites_for(model).weight_name(layer) for layer in LAYERS]
    edit_in_float32(model, names)
    others = {n: p.detach().clone() for n, p in model.named_parameters() if n not in names}
    start = {n: model.get_parameter(n).detach().clone() for n in names}
    before = nll(model, tokenizer)

    config, kind = EDITORS["memit"]
    editor = kind(config(layers=LAYERS, **SETTINGS))
    assert editor.parameters(sites_for(model)) == tuple(names)
    stream = editor.start(model, tokenizer, covariance=covariance, seed=0)
    stream.contexts = CONTEXTS
    deltas = stream.edit([REQUEST])

    assert nll(model, tokenizer) < 0.1 * before
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = model.get_parameter(name)
            assert weight.dtype == torch.float32
            assert torch.equal(weight, start[name] + dense(delta))
            weight.copy_(start[name])
    assert nll(model, tokenizer) == before
