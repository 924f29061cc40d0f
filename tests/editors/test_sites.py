"""The table of architectures against real modules."""

import pytest
import torch

from benchmarks import reference, tiny
from editors.sites import SITES, sites_for, sites_of


def test_every_architecture_of_the_table_is_tested() -> None:
    assert set(SITES) == set(tiny.MODEL_TYPES)


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_paths_and_orientation(model_type: str) -> None:
    model = tiny.tiny_model(model_type, width=32, d_ff=48)
    sites = sites_for(model)
    assert len(sites.blocks(model)) == 5
    weight = model.get_parameter(sites.weight_name(3))
    assert tuple(weight.shape) == ((48, 32) if sites.transposed else (32, 48))
    assert sites.weight_name(3) == reference.weight_name(model, 3)
    for path in (sites.attention_projection.format(0), sites.final_norm, sites.head):
        model.get_submodule(path)
    ids = torch.tensor([[5, 6, 7]])
    hidden = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.get_submodule(sites.head)(hidden), model(input_ids=ids).logits)


def test_unknown_architectures_and_layers_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'bloom'.*editors/sites\.py"):
        sites_of("bloom")
    model = tiny.tiny_model("gpt2")
    with pytest.raises(ValueError, match=r"\[5, 9\].*0 to 4"):
        sites_for(model).check_layers(model, (1, 5, 9))
