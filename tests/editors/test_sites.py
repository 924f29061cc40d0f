"""The table of architectures against real modules."""

import pytest
import torch

from benchmarks import reference, tiny
from editors.capture import logits_of, outputs_of
from editors.sites import SITES, sites_for, sites_of


def test_every_architecture_of_the_table_is_tested() -> None:
    assert set(SITES) == set(tiny.ALL_TYPES)


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_paths_and_orientation(model_type: str) -> None:
    model = tiny.tiny_model(model_type, width=32, d_ff=48)
    sites = sites_for(model)
    assert len(sites.blocks(model)) == 5
    weight = model.get_parameter(sites.weight_name(3))
    assert tuple(weight.shape) == ((48, 32) if sites.transposed else (32, 48))
    assert sites.weight_name(3) == reference.weight_name(model, 3)
    inputs = [path for path in (sites.mlp_up, sites.mlp_gate) if path]
    for path in (sites.attention_projection, *inputs):
        model.get_submodule(path.format(0))
    assert (sites.projection(model, 3).bias is not None) == sites.mlp_bias
    ids = torch.tensor([[5, 6, 7]])
    with outputs_of(sites.blocks(model)[-1]) as hidden:
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(logits_of(model, sites, hidden[0]), logits)


def test_unknown_architectures_and_layers_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'bloom'.*editors/sites\.py"):
        sites_of("bloom")
    model = tiny.tiny_model("gpt2")
    with pytest.raises(ValueError, match=r"\[5, 9\].*0 to 4"):
        sites_for(model).check_layers(model, (1, 5, 9))
