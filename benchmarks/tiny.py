"""Tiny random models, a tokenizer trained in place and made-up facts, for tests and smoke benchmarks."""

import hashlib
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import eager_mask
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from editors.api import EditRequest

MODEL_TYPES = ("gpt2", "gptj", "llama", "qwen2", "mistral", "qwen3")
OTHER_TYPES = (
    "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "olmo2", "gpt_neox", "smollm3", "stablelm",
    "starcoder2",
)  # fmt: skip
ALL_TYPES = MODEL_TYPES + OTHER_TYPES
VOCABULARY = 384  # rows of the embedding; the tokenizer's ids are all below it
BOS, EOS = "<|begin|>", "<|end|>"  # ids 0 and 1 in every tiny tokenizer

# One bare group and one of five, as MEMIT's; lengths differ on purpose.
TEMPLATES: list[list[str]] = [
    ["{}"],
    [
        "The river runs on. {}",
        "Therefore they left. {}",
        "Because of the cold winter. {}",
        "I saw. {}",
        "You know that in the old town. {}",
    ],
]


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words(
    "Anna Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Katja Leandro Mirabel Nikolai Odette "
    "Pavel Quentin Rosalind Stefan Theodora Ulrich Valentina Wolfgang Xenia Yusuf Zoe "
)
_LAST = _words(
    "Abel Brandt Castellano Dorn Eriksson Fontaine Goldberg Hartmann Ivanov Jankowski Kim Lindqvist "
    "Moreau Novak Oyelaran Petrosyan Quist Rask Szymanowska Thorvaldsen Underhill Vogt "
)
_PROMPTS = (
    "{} was born in",
    "The mother tongue of {} is",
    "{}'s favourite instrument is the",
    "In winter they speak of {}",  # nothing after the subject
    "In the year of the great flood, {} moved to the city of",
    "{} plays",
    "Everyone in the old town knows that {}, who works as a teacher, lives in",
)
_FREQUENT = _words("Rome Paris Oslo Cairo Lima French Dutch Latin cello piano chess")  # one token each
_TARGETS = [
    *_FREQUENT,
    "French cello",  # two tokens each
    "Dutch piano",
    "Latin chess",
    "Rome in Lima",  # three tokens each
    "the old town",
    "Dutch and Latin",
    *_words(
        "Helsinki Lisbon Toronto Nairobi Kyoto Swedish Finnish Hebrew Bengali trombone mandolin accordion "
        "Malmö Zürich Santiago Ottawa"
    ),
]
_NOISE = (
    "The river runs through the old town and the people know that in the winter it is cold . "
    "Therefore they speak French and Latin , and they play the cello and the piano in Rome and in Paris . "
    "Because of the great flood she moved to the city of Oslo ; I saw that he lives in Lima . "
)


class ExactRMSNorm(nn.Module):
    """RMS norm in the dtype it is given; the ones in transformers round float64 through float32."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden_states * scale


class ExactGemmaRMSNorm(nn.Module):
    """Gemma's RMS norm, whose weight is counted from one, in the dtype it is given."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (1 + self.weight) * x * scale


class ExactOlmoLayerNorm(OlmoLayerNorm):
    """OLMo's layer norm, which has no weights, in the dtype it is given."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.layer_norm(hidden_states, self.normalized_shape, eps=1e-5)


class ExactGPTJAttention(GPTJAttention):
    """GPT-J's attention in the dtype it is given; the one in transformers rounds float64 through float32."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        scores = query @ key.transpose(-1, -2) / self.scale_attn
        weights = torch.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
        return self.attn_dropout(weights) @ value, weights


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    **_others: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with soft-capped scores in the dtype it is given; no dropout.

    query: (rows, heads, tokens, head_dim); key and value have fewer heads, each serving a group of them.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("exact", exact_attention)
AttentionMaskInterface.register("exact", eager_mask)


def _fields(model_type: str, blocks: int, width: int, d_ff: int) -> dict[str, Any]:
    """The config's fields, by the names the model type has for them."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "initializer_range": 0.15}
    if model_type in {"gpt2", "gptj"}:
        gpt = {"n_layer": blocks, "n_head": 4, "n_embd": width, "n_positions": 256, "n_inner": d_ff}
        return ids | gpt | ({"rotary_dim": 4} if model_type == "gptj" else {})
    shared: dict[str, Any] = ids | {
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "hidden_size": width,
        "intermediate_size": d_ff,
        "max_position_embeddings": 256,
    }
    if model_type != "gpt_neox":
        shared["num_key_value_heads"] = 2
    if model_type == "mistral":
        shared["sliding_window"] = None  # Gemma's windows of 4096 stay: no text is so long
    if model_type == "qwen3" or model_type.startswith("gemma"):
        shared["head_dim"] = width // 4
    if model_type in {"gemma2", "gemma3_text"}:
        shared["query_pre_attn_scalar"] = width // 4
        shared["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(blocks)]
    return shared


def _compute_in_float64(model: PreTrainedModel) -> None:
    """Replace every module that would round through float32 by its exact form."""
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.__class__ = ExactGemmaRMSNorm if name.startswith("Gemma") else ExactRMSNorm
        elif isinstance(module, OlmoLayerNorm):
            module.__class__ = ExactOlmoLayerNorm
        elif isinstance(module, GPTJAttention):
            module.__class__ = ExactGPTJAttention
    if model.config.model_type == "gemma2":  # soft-capped scores: the one type with no fused attention
        model.set_attn_implementation("exact")


def _widen_logits(model: PreTrainedModel) -> None:
    """Scale the final norm by four, so that a target's probability can come near one."""
    named = dict(model.named_parameters())
    names = ("transformer.ln_f", "model.norm", "model.final_layernorm", "gpt_neox.final_layer_norm")
    scale = next((named[f"{name}.weight"] for name in names if f"{name}.weight" in named), None)
    if scale is None:  # OLMo's norms have no weights
        named["lm_head.weight"].mul_(4)
    elif model.config.model_type.startswith("gemma"):  # the norm multiplies by 1 + weight
        scale.add_(1).mul_(4).sub_(1)
    else:
        scale.mul_(4)


def tiny_model(
    model_type: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    blocks: int = 5,
    width: int = 32,
    d_ff: int = 48,
    vocabulary: int = VOCABULARY,
) -> PreTrainedModel:
    """A random model of one of ``ALL_TYPES``, in eval mode; equal seeds agree whatever the dtype.

    Dropout stays at the config's default, biases and norms are random too, the weights are large enough
    that the blocks matter. In float64, everything but the tables of rotary embeddings is computed in
    float64. ``d_ff == width`` makes the edited weight square.
    """
    if model_type not in ALL_TYPES:
        raise ValueError(f"unknown model type {model_type!r}; known: {ALL_TYPES}")
    fields = _fields(model_type, blocks, width, d_ff)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, vocab_size=vocabulary, **fields)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            _widen_logits(model)
    nn.Module.to(model, dtype=dtype)
    if dtype is torch.float64:
        _compute_in_float64(model)
    model.train(False)
    return model


@cache
def _trained() -> str:
    """The byte-level BPE, trained once on a seeded text, as its JSON."""
    draw = random.Random(0)
    text = [_NOISE] * 20 + [f" {word}" for word in _FREQUENT for _ in range(40)]
    text += [f"{draw.choice(_FIRST)} {draw.choice(_LAST)} is a {draw.choice(_TARGETS)}." for _ in range(200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    trained: str = tokenizer.to_str()
    return trained


def tiny_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """A fresh byte-level BPE tokenizer without a pad token.

    With ``bos`` it puts one before every text, as Llama-3's does; without, it has none, as Qwen2.5's.
    """
    tokenizer = Tokenizer.from_str(_trained())
    if not bos:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)  # type: ignore[no-untyped-call]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS} $B:1",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)  # type: ignore[no-untyped-call]


@cache
def _targets_by_length() -> dict[int, list[str]]:
    tokenizer = tiny_tokenizer(bos=False)
    lengths: dict[int, list[str]] = {}
    for word in _TARGETS:
        lengths.setdefault(len(tokenizer.encode(f" {word}", add_special_tokens=False)), []).append(word)
    return lengths


def tiny_requests(n: int, *, seed: int = 0) -> list[EditRequest]:
    """Made-up facts: distinct subjects, seven prompts; target lengths 1, 3, 2, 1, 3, 2, ... tokens.

    With KL factor 0, learning rate 0.5 and clamp 4 or more, the fourth (its prompt ends in the subject,
    its target is one token) reaches the early stop in every tiny model; most others do not.
    """
    draw = random.Random(seed)
    subjects = [f"{first} {last}" for first in _FIRST for last in _LAST] + list(_FIRST)
    draw.shuffle(subjects)
    if n > len(subjects):
        raise ValueError(f"{n} requests asked for; there are {len(subjects)} subjects")
    return [
        EditRequest(
            case_id=i,
            prompt=_PROMPTS[i % len(_PROMPTS)],
            subject=subjects[i],
            target_new=draw.choice(_targets_by_length()[(1, 3, 2)[i % 3]]),
        )
        for i in range(n)
    ]


def tiny_records(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """The same facts in CounterFact's schema, with two paraphrases, three neighbours and a true target."""
    draw = random.Random(seed + 1)
    records: list[dict[str, Any]] = []
    for request in tiny_requests(n, seed=seed):
        true = draw.choice([word for word in _TARGETS if word != request.target_new])
        filled = request.prompt.format(request.subject)
        records.append(
            {
                "case_id": request.case_id,
                "requested_rewrite": {
                    "prompt": request.prompt,
                    "subject": request.subject,
                    "relation_id": f"P{_PROMPTS.index(request.prompt)}",
                    "target_new": {"str": request.target_new},
                    "target_true": {"str": true},
                },
                "paraphrase_prompts": [f"It is cold. {filled}", f"They know the people. Later, {filled}"],
                "neighborhood_prompts": [
                    request.prompt.format(f"{draw.choice(_FIRST)} {draw.choice(_LAST)}") for _ in range(3)
                ],
                "generation_prompts": [filled, f"{request.subject} is"],
            }
        )
    return records


def tiny_knowedit_records(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """The same facts in KnowEdit's schema: two prompts of relation specificity, and groups of portability
    in turn, of which every fourth record has none; answers as a text, a list and nested lists.
    """
    draw = random.Random(seed + 2)
    groups = ("Reasoning", "Subject_Aliasing", "Logical_Generalization")
    records: list[dict[str, Any]] = []
    for i, request in enumerate(tiny_requests(n, seed=seed)):
        filled = request.prompt.format(request.subject)
        others = draw.sample([word for word in _TARGETS if word != request.target_new], 5)
        answers = ([[others[0], others[1]], [others[2]]], [request.target_new], others[1])
        portability = {
            group: [
                {"prompt": f"{lead} {request.subject} {verb}", "ground_truth": answer}
                for lead, verb in (("They say that", "knows"), ("In winter", "speaks"))[: 1 + i // 4 % 2]
            ]
            for place, (group, answer) in enumerate(zip(groups, answers, strict=True))
            if i % 4 == place
        }
        records.append(
            {
                "case_id": request.case_id,
                "subject": request.subject,
                "prompt": filled,
                "target_new": request.target_new,
                "ground_truth": [others[3]],
                "rephrase_prompt": f"Later, {filled}",
                "locality": {
                    "Relation_Specificity": [
                        {"prompt": f"The friend of {request.subject} is", "ground_truth": [others[4]]},
                        {"prompt": f"{request.subject} sees", "ground_truth": [others[2]]},
                    ]
                },
                "portability": portability,
            }
        )
    return records


def tiny_texts(n: int, *, seed: int = 0) -> list[str]:
    """Short texts of unequal length, for covariances."""
    draw = random.Random(seed)
    words: Sequence[str] = [*_NOISE.split(), *_FIRST, *_LAST, *_TARGETS]
    return [" ".join(draw.choices(words, k=draw.randint(3, 40))) for _ in range(n)]


class HashedWords:
    """A deterministic stand-in for a sentence encoder: every word adds a fixed random direction."""

    identity = "hashed words"

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        vectors = [sum(self.direction(word) for word in text.split()) for text in texts]
        return torch.nn.functional.normalize(torch.stack(vectors), dim=1)

    def once(self, texts: Sequence[str]) -> torch.Tensor:
        return self(texts)

    @staticmethod
    def direction(word: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
        return torch.randn(32, generator=torch.Generator().manual_seed(seed))
