"""Where weights sit in each architecture: stated once, here."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Place = Literal["block", "mlp", "attention"]  # an output inside a block: its own, or a projection's


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Module paths of one architecture; ``{}`` stands for the block's number."""

    block: str
    mlp_projection: str  # MLP output projection; its input is the key
    mlp_up: str | None  # MLP input projection; None where gate and up are fused
    mlp_gate: str | None  # the gated MLP's other input projection
    attention_projection: str
    final_norm: str
    mlp_bias: bool = False  # whether the MLP output projection has a bias
    transposed: bool = False  # True: weights are stored (d_in, d_out), as GPT-2's Conv1D does

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """All blocks, lowest first."""
        modules = model.get_submodule(self.block.removesuffix(".{}"))
        assert isinstance(modules, nn.ModuleList)
        return modules

    def projection(self, model: PreTrainedModel, layer: int) -> nn.Module:
        """The MLP output projection of one block."""
        return model.get_submodule(self.mlp_projection.format(layer))

    def weight_name(self, layer: int) -> str:
        """Parameter name of the edited weight in one block."""
        return self.mlp_projection.format(layer) + ".weight"

    def check_layers(self, model: PreTrainedModel, layers: tuple[int, ...]) -> None:
        """Raise ValueError if a layer is not in the model."""
        count = len(self.blocks(model))
        beyond = [layer for layer in layers if not 0 <= layer < count]
        if beyond:
            raise ValueError(f"layers {beyond} are not in the model; it has blocks 0 to {count - 1}")


GPT2 = Sites(
    block="transformer.h.{}",
    mlp_projection="transformer.h.{}.mlp.c_proj",
    mlp_up="transformer.h.{}.mlp.c_fc",
    mlp_gate=None,
    attention_projection="transformer.h.{}.attn.c_proj",
    final_norm="transformer.ln_f",
    mlp_bias=True,
    transposed=True,
)
GPTJ = Sites(
    block="transformer.h.{}",
    mlp_projection="transformer.h.{}.mlp.fc_out",
    mlp_up="transformer.h.{}.mlp.fc_in",
    mlp_gate=None,
    attention_projection="transformer.h.{}.attn.out_proj",
    final_norm="transformer.ln_f",
    mlp_bias=True,
)
LLAMA = Sites(
    block="model.layers.{}",
    mlp_projection="model.layers.{}.mlp.down_proj",
    mlp_up="model.layers.{}.mlp.up_proj",
    mlp_gate="model.layers.{}.mlp.gate_proj",
    attention_projection="model.layers.{}.self_attn.o_proj",
    final_norm="model.norm",
)
PHI = replace(
    LLAMA,
    mlp_projection="model.layers.{}.mlp.fc2",
    mlp_up="model.layers.{}.mlp.fc1",
    mlp_gate=None,
    attention_projection="model.layers.{}.self_attn.dense",
    final_norm="model.final_layernorm",
    mlp_bias=True,
)
STARCODER2 = replace(
    LLAMA,
    mlp_projection="model.layers.{}.mlp.c_proj",
    mlp_up="model.layers.{}.mlp.c_fc",
    mlp_gate=None,
    mlp_bias=True,
)
GPT_NEOX = Sites(
    block="gpt_neox.layers.{}",
    mlp_projection="gpt_neox.layers.{}.mlp.dense_4h_to_h",
    mlp_up="gpt_neox.layers.{}.mlp.dense_h_to_4h",
    mlp_gate=None,
    attention_projection="gpt_neox.layers.{}.attention.dense",
    final_norm="gpt_neox.final_layer_norm",
    mlp_bias=True,
)

SITES: dict[str, Sites] = {  # by config.model_type
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "gptj": GPTJ,
    "llama": LLAMA,
    "mistral": LLAMA,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "phi": PHI,
    "phi3": replace(LLAMA, mlp_up=None, mlp_gate=None),  # one projection for both
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": STARCODER2,
}


def sites_of(model_type: str) -> Sites:
    """The sites of an architecture, named as in ``model.config.model_type``.

    Raises ValueError for an unknown one, saying what to add.
    """
    try:
        return SITES[model_type]
    except KeyError:
        raise ValueError(
            f"unknown architecture {model_type!r}; known: {sorted(SITES)}. To add it, write one line in "
            "editors/sites.py naming its blocks, MLP projections, attention output projection, final norm "
            "and weight orientation, and its name in tests/editors/test_sites.py"
        ) from None


def sites_for(model: PreTrainedModel) -> Sites:
    """The sites of a loaded model."""
    return sites_of(model.config.model_type)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model takes its token ids."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight.device
