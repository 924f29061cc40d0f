"""Packed products equal plain ones to rounding, and notice a changed weight."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.tiny import MODEL_TYPES, tiny_model
from harness import onednn
from harness.models import weights_in_place

pytestmark = pytest.mark.skipif(not onednn.available(), reason="this PyTorch has no packed oneDNN products")

D_IN, D_OUT = 48, 32


def layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module
    if kind == "conv1d":
        module = Conv1D(D_OUT, D_IN)
        nn.init.normal_(module.weight, std=0.2)
        nn.init.normal_(module.bias)
    else:
        module = nn.Linear(D_IN, D_OUT, bias=kind == "linear")
    return module.requires_grad_(False)


def pack(module: nn.Module, leave: set[str] = frozenset()) -> int:  # type: ignore[assignment]
    holder = nn.Module()
    holder.inner = module
    return onednn.pack_linears(holder, leave=set(leave))  # type: ignore[arg-type]


def plain(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = type(module).forward(module, x)
    return out


KINDS = ("linear", "no bias", "conv1d")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, D_IN), (3, 5, D_IN), (D_IN,), (0, D_IN)])
def test_products_are_equal_to_rounding(kind: str, shape: tuple[int, ...]) -> None:
    module = layer(kind)
    assert pack(module) == 1
    assert isinstance(module.forward, onednn._Packed)
    x = torch.randn(shape)
    torch.testing.assert_close(module(x), plain(module, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_no_less_exact_than_plain_ones(kind: str) -> None:
    module, x = layer(kind), torch.randn(64, D_IN)
    exact = plain(layer(kind).double(), x.double())
    usual = (plain(module, x) - exact).abs().max()
    pack(module)
    assert (module(x) - exact).abs().max() < 4 * usual  # float32 throughout, no bfloat16 inside


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through(kind: str) -> None:
    module = layer(kind)
    x = torch.randn(2, 5, D_IN)
    gradients = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        (module(leaf) ** 2).sum().backward()
        gradients.append(leaf.grad)
        pack(module)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)
    assert module.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_broadcast_outputs_pass_through(kind: str) -> None:
    """Gradients that are expanded or transposed are no plain blocks of memory."""
    module = layer(kind)
    gradients = []
    for _ in range(2):
        leaf = torch.ones(4, 3, D_IN, requires_grad=True)
        module(leaf).transpose(0, 1).sum(dim=1).sum().backward()
        gradients.append(leaf.grad)
        pack(module)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_weight_is_packed_anew(kind: str) -> None:
    module, x = layer(kind), torch.randn(4, D_IN)
    pack(module)
    module(x.clone().requires_grad_()).sum().backward()  # both directions are packed
    with torch.no_grad():
        module.weight.mul_(2)
    torch.testing.assert_close(module(x), plain(module, x), rtol=1e-5, atol=1e-5)
    module.weight.data = torch.randn_like(module.weight)
    torch.testing.assert_close(module(x), plain(module, x), rtol=1e-5, atol=1e-5)
    leaf = x.clone().requires_grad_()
    module(leaf).sum().backward()
    weight = module.weight if kind == "conv1d" else module.weight.T
    torch.testing.assert_close(leaf.grad, weight.sum(1).expand(4, -1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_changed_bias_is_noticed(kind: str) -> None:
    module, x = layer(kind), torch.randn(4, D_IN)
    pack(module)
    module(x)
    with torch.no_grad():
        module.bias.add_(3)
    torch.testing.assert_close(module(x), plain(module, x), rtol=1e-5, atol=1e-5)


def test_other_dtypes_and_trained_weights_take_the_plain_way() -> None:
    module, x = layer("linear"), torch.randn(4, D_IN)
    pack(module)
    module.weight.requires_grad_(True)
    module(x).sum().backward()
    assert module.weight.grad is not None
    module.weight.requires_grad_(False)
    module.double()
    assert module(x.double()).dtype == torch.float64


def test_layers_named_or_of_other_dtypes_are_left() -> None:
    module = layer("linear")
    assert pack(module, {"inner.weight"}) == 0
    assert "forward" not in vars(module)
    assert pack(layer("linear").double()) == 0
    assert pack(layer("linear").bfloat16()) == 0
    assert pack(nn.LayerNorm(4)) == 0


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_models_logits_are_equal_to_rounding(model_type: str) -> None:
    model, packed = (tiny_model(model_type).requires_grad_(False) for _ in range(2))
    name = next(
        n
        for n, _ in model.named_parameters()
        if ".2." in n and ("mlp.c_proj" in n or "fc_out" in n or "down" in n)
    )
    linears = sum(isinstance(module, nn.Linear | Conv1D) for module in model.modules())
    assert onednn.pack_linears(packed, leave={name}) == linears - 1
    assert "forward" not in vars(packed.get_submodule(name.removesuffix(".weight")))
    ids = torch.arange(2, 62).reshape(4, 15)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-4)
        other = {name: model.get_parameter(name) * 1.5}
        with weights_in_place(model, other), weights_in_place(packed, other):
            torch.testing.assert_close(packed(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-4)
