"""Frozen linear layers on a CPU through oneDNN with weights packed once.

PyTorch hands float32 products to MKL, which on processors that are not Intel's leaves half of the speed
unused; oneDNN does not. The products are float32 throughout, so results differ by rounding only.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

CACHED = "128"  # products of different shapes whose code is kept: more than one step of an optimisation has
_OPS = ("_reorder_linear_weight", "_linear_pointwise")


def available() -> bool:
    """Whether this build of PyTorch offers oneDNN's packed products."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, op) for op in _OPS)  # type: ignore[no-untyped-call]


def pack_linears(model: PreTrainedModel, *, leave: set[str]) -> int:
    """Let the float32 linear layers of a CPU model compute through oneDNN; how many do.

    leave: names of parameters that will change; their layers stay as they are. A packed layer whose weight
    is exchanged or written to nevertheless is packed anew; writes through ``.data`` go unnoticed. Costs a
    copy of each weight, two where gradients pass through. None do where this build cannot.
    """
    if not available():
        return 0
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", CACHED)  # read at the first product; else 1,024
    packed = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (
            isinstance(module, nn.Linear | Conv1D)
            and f"{name}.weight" not in leave
            and weight is not None
            and weight.dtype == torch.float32
            and weight.device.type == "cpu"
        ):
            module.forward = _Packed(module)  # type: ignore[method-assign]
            packed += 1
    return packed


class _Packed:
    """The forward of one linear layer."""

    def __init__(self, module: nn.Linear | Conv1D) -> None:
        self.weight: Tensor = module.weight
        self.bias: Tensor | None = module.bias
        self.transposed = isinstance(module, Conv1D)
        forward: Any = type(module).forward
        self.plain: Callable[[Tensor], Tensor] = partial(forward, module)
        self.state: tuple[int, int] | None = None
        self.straight: Tensor | None = None
        self.back: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or not x.numel() or self.weight.requires_grad:
            return self.plain(x)
        state = (self.weight.data_ptr(), self.weight._version)
        if state != self.state:
            self.state, self.straight, self.back = state, None, None
        return _Product.apply(x, self)  # type: ignore[no-any-return]

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b."""
        if self.straight is None:
            self.straight = _pack(self.weight.T if self.transposed else self.weight)
        return _apply(x, self.straight, self.bias)

    def product_back(self, gradient: Tensor) -> Tensor:
        """gradient W."""
        if self.back is None:
            self.back = _pack(self.weight if self.transposed else self.weight.T)
        return _apply(gradient, self.back, None)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Packed) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.product_back(gradient), None


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


def _apply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out
