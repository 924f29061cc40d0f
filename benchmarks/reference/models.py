"""Where the parts of a model are, and hooks on them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where the parts of one model type are and how the edited weight is stored."""

    block: str
    projection: str  # MLP output, inside the block
    attention: str  # attention output projection, inside the block
    norm: str
    head: str = "lm_head"
    transposed: bool = False  # weights stored as (d_in, d_out)
    soft_capped: bool = False  # the logits are cap * tanh(head / cap) where the config names a cap


_LLAMA = Architecture(
    block="model.layers.{}", projection="mlp.down_proj", attention="self_attn.o_proj", norm="model.norm"
)
_SOFT_CAPPED = replace(_LLAMA, soft_capped=True)
ARCHITECTURES = {
    "gemma": _LLAMA,
    "gemma2": _SOFT_CAPPED,
    "gemma3_text": _SOFT_CAPPED,
    "gpt2": Architecture(
        block="transformer.h.{}", projection="mlp.c_proj", attention="attn.c_proj", norm="transformer.ln_f",
        transposed=True,
    ),
    "gpt_neox": Architecture(
        block="gpt_neox.layers.{}", projection="mlp.dense_4h_to_h", attention="attention.dense",
        norm="gpt_neox.final_layer_norm",
    ),
    "gptj": Architecture(
        block="transformer.h.{}", projection="mlp.fc_out", attention="attn.out_proj", norm="transformer.ln_f"
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "phi": Architecture(
        block="model.layers.{}", projection="mlp.fc2", attention="self_attn.dense",
        norm="model.final_layernorm",
    ),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": replace(_LLAMA, projection="mlp.c_proj"),
}  # fmt: skip


def architecture(model: PreTrainedModel) -> Architecture:
    """The row of the table above for this model."""
    model_type = model.config.model_type
    if model_type not in ARCHITECTURES:
        raise ValueError(f"no architecture for model type {model_type!r}; known: {sorted(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def weight_name(model: PreTrainedModel, layer: int) -> str:
    """Name of the edited parameter of a block."""
    parts = architecture(model)
    return f"{parts.block.format(layer)}.{parts.projection}.weight"


def block_of(model: PreTrainedModel, layer: int) -> nn.Module:
    """The whole block; its output is the residual stream."""
    return model.get_submodule(architecture(model).block.format(layer))


def projection_of(model: PreTrainedModel, layer: int) -> nn.Module:
    """The MLP output projection; its input is the key."""
    return block_of(model, layer).get_submodule(architecture(model).projection)


def attention_of(model: PreTrainedModel, layer: int) -> nn.Module:
    """The attention output projection."""
    return block_of(model, layer).get_submodule(architecture(model).attention)


def weight_of(model: PreTrainedModel, layer: int) -> Tensor:
    """The edited parameter of a block as (d_out, d_in), float64, a copy."""
    weight = model.get_parameter(weight_name(model, layer)).detach().double()
    return (weight.T if architecture(model).transposed else weight).clone()


def bias_of(model: PreTrainedModel, layer: int) -> Tensor:
    """The bias of the edited projection as (d_out, 1), float64; zero where it has none."""
    bias = getattr(projection_of(model, layer), "bias", None)
    found = torch.zeros(weight_of(model, layer).shape[0]) if bias is None else bias.detach()
    return found.to(model.device, torch.float64).unsqueeze(1)


@torch.no_grad()
def change_weight(model: PreTrainedModel, layer: int, change: Tensor) -> Tensor:
    """Add a change (d_out, d_in) to the edited parameter; returns it in the stored shape and dtype."""
    weight = model.get_parameter(weight_name(model, layer))
    stored = (change.T if architecture(model).transposed else change).to(weight.dtype).contiguous()
    weight.add_(stored)
    return stored


@contextmanager
def changes(model: PreTrainedModel, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """When the block ends, what changed in each parameter, in its stored shape, in float64."""
    before = {name: model.get_parameter(name).detach().double().clone() for name in names}
    found: dict[str, Tensor] = {}
    yield found
    found |= {name: model.get_parameter(name).detach().double() - before[name] for name in names}


def hidden_state(output: Any) -> Tensor:
    """What a module puts out; some blocks return it in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no gradients of weights, all as before afterwards."""
    training = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    nn.Module.train(model, False)
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)


@contextmanager
def recorded_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module puts out, one entry a forward."""
    seen: list[Tensor] = []

    def record(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(hidden_state(output))

    handle = module.register_forward_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def recorded_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module takes in, one entry a forward."""
    seen: list[Tensor] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def added(module: nn.Module, delta: Tensor, positions: Sequence[int], before: list[Tensor]) -> Iterator[None]:
    """Add ``delta`` to the module's output at one position of every row; keep the first output unchanged."""

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = hidden_state(output)
        if not before:
            before.append(hidden.detach().clone())
        changed = hidden.clone()
        for row, position in enumerate(positions):
            changed[row, position] = changed[row, position] + delta
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def full_precision(values: Tensor) -> Tensor:
    """At least float32."""
    return values if values.dtype is torch.float64 else values.float()
