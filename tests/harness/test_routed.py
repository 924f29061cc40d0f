"""Every row is, bit for bit, what the unedited or the merged model alone gives at the same batch shape."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, pipeline

from benchmarks.tiny import MODEL_TYPES, tiny_model, tiny_tokenizer
from editors.sites import sites_for
from harness import onednn
from harness.models import prepare_tokenizer
from harness.routed import RoutedModel
from routing import Decision

LAYERS = (1, 3)
PROMPTS = [
    "Anna Abel plays",
    "In the year of the great flood, Hugo Kim moved to the city of",
    "They speak of Anna Novak",
    "Zoe Rask was born in",
]
SENT = [True, False, True, False]  # by the router below


class ByName:
    """Sends what names Anna to the edited model, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def add(self, expert: str | None, texts: Sequence[str]) -> None: ...

    def route(self, texts: Sequence[str]) -> list[Decision]:
        self.asked += texts
        return [
            Decision(expert="edited" if "Anna" in text else None, score=1.0, nearest=(0,)) for text in texts
        ]

    def route_many(self, texts: Sequence[str], ks: Sequence[int]) -> dict[int, list[Decision]]:
        return {k: self.route(texts) for k in ks}


def edits(model: PreTrainedModel) -> dict[str, Tensor]:
    """Large changes of two projections, in float32."""
    draw = torch.Generator().manual_seed(1)
    names = [sites_for(model).weight_name(layer) for layer in LAYERS]
    own = {name: model.get_parameter(name).detach().float() for name in names}
    return {name: value + 0.3 * torch.randn(value.shape, generator=draw) for name, value in own.items()}


def alone(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The unedited and the merged model."""
    base, merged = (tiny_model(model_type, dtype=dtype).requires_grad_(False) for _ in range(2))
    for name, value in edits(base).items():
        merged.get_parameter(name).copy_(value)
    return base, merged


def tokenizer_of(model_type: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(bos=model_type == "llama")
    prepare_tokenizer(tokenizer)
    return tokenizer


def routed_model(model_type: str, dtype: torch.dtype = torch.float32, **more: Any) -> RoutedModel:
    model = tiny_model(model_type, dtype=dtype).requires_grad_(False)
    return RoutedModel(model, tokenizer_of(model_type), edits(model), **{"router": ByName()} | more)


def encoded(model_type: str, side: str = "left") -> dict[str, Tensor]:
    found = tokenizer_of(model_type)(PROMPTS, return_tensors="pt", padding=True, padding_side=side)
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def assert_rows(found: Tensor, base: Tensor, merged: Tensor, sent: Sequence[bool]) -> None:
    """Equal bits, row by row, where the two models differ in every row."""
    each = len(found) // len(sent)
    for i, edited in enumerate(sent):
        rows = slice(i * each, (i + 1) * each)
        assert not torch.equal(base[rows], merged[rows])
        assert torch.equal(found[rows], (merged if edited else base)[rows]), i


TYPES = pytest.mark.parametrize("model_type", ["gpt2", "llama"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@DTYPES
@pytest.mark.parametrize("sent", [SENT, [False] * 4, [True] * 4, [False, False, False, True]])
@torch.no_grad()
def test_rows_of_a_forward(model_type: str, dtype: torch.dtype, sent: list[bool]) -> None:
    base, merged = alone(model_type, dtype)
    batch = encoded(model_type, "right")
    routed = routed_model(model_type, dtype)
    with routed.rows(sent):
        found = routed.model(**batch).logits
    assert_rows(found, base(**batch).logits, merged(**batch).logits, sent)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "prefill in chunks": {"do_sample": False, "prefill_chunk_size": 3},
    "sampling": {"do_sample": True},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "beams, no cache": {"num_beams": 4, "use_cache": False},
}


@TYPES
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_a_generation(model_type: str, way: str) -> None:
    batch = encoded(model_type)
    options = {"min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 1, "output_logits": True}

    def generated(model: Any) -> tuple[Tensor, Tensor]:
        """Logits of every step (a row a beam) and tokens."""
        torch.manual_seed(0)
        out = model.generate(**batch, **options, **WAYS[way], return_dict_in_generate=True)
        return torch.stack(out.logits, dim=1), out.sequences

    routed = routed_model(model_type)
    found, base, merged = map(generated, (routed.model, *alone(model_type)))
    assert_rows(found[0], base[0], merged[0], SENT)
    tokens = [part[1].unflatten(0, (len(PROMPTS), -1)) for part in (found, base, merged)]
    assert torch.equal(tokens[0], torch.where(torch.tensor(SENT).view(-1, 1, 1), tokens[2], tokens[1]))
    assert routed.router.asked == PROMPTS  # type: ignore[union-attr]  # the text alone, once for all steps


@DTYPES
def test_steps_by_hand_keep_the_decision_of_the_prompt(dtype: torch.dtype) -> None:
    base, merged = alone("llama", dtype)
    routed = routed_model("llama", dtype)
    batch = encoded("llama")
    batch["input_ids"][batch["attention_mask"] == 0] = 300  # an ordinary token; the mask says it is padding
    more = tokenizer_of("llama")([" Anna"] * 4, return_tensors="pt", add_special_tokens=False)["input_ids"]
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)

    @torch.no_grad()
    def stepped(model: Any) -> Tensor:
        out = model(**batch)
        logits: Tensor = model(more, attention_mask=mask, past_key_values=out.past_key_values).logits
        return logits

    assert_rows(stepped(routed.model), stepped(base), stepped(merged), SENT)
    assert routed.router.asked == PROMPTS  # type: ignore[union-attr]
    cache = base(**batch).past_key_values
    with pytest.raises(ValueError, match="filled undecided"):
        routed.model(more, attention_mask=mask, past_key_values=cache)


def test_a_route_can_be_named() -> None:
    routed = routed_model("gpt2")
    router = routed.router
    assert isinstance(router, ByName)
    options = {"do_sample": False, "max_new_tokens": 6}
    edited = routed.generate(PROMPTS, route="edited", **options)
    unedited = routed.generate(PROMPTS, route="unedited", **options)
    mixed = [e if sent else u for e, u, sent in zip(edited, unedited, SENT, strict=True)]
    assert len(set(edited) & set(unedited)) == 0
    assert router.asked == []
    assert routed.generate(PROMPTS, **options) == mixed
    assert routed.generate(PROMPTS, route=SENT, **options) == mixed
    routed.default_route = "unedited"
    assert routed.generate(PROMPTS, **options) == unedited
    assert routed.generate(PROMPTS, route="auto", **options) == mixed
    with routed.rows("edited"):
        assert routed.generate(PROMPTS, **options) == edited
        with routed.rows([not sent for sent in SENT]):
            assert set(routed.generate(PROMPTS, **options)).isdisjoint(mixed)
    assert router.asked == PROMPTS * 2
    several = routed.generate(PROMPTS[:2], num_beams=3, num_return_sequences=3, max_new_tokens=6)
    assert len(several) == 6
    assert routed.generate([]) == []


def test_decisions_are_given_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    routed = routed_model("llama")
    with caplog.at_level("INFO", logger="harness.routed"):
        decisions = routed.route(["Anna plays", " ", "Zoe"])
    assert [decision.expert for decision in decisions] == ["edited", None, None]
    assert routed.router.asked == ["Anna plays", "Zoe"]  # type: ignore[union-attr]
    assert "edited, score 1.000, nearest (0,): 'Anna plays'" in caplog.text
    alone_with_edits = routed_model("llama", router=None)
    assert alone_with_edits.default_route == "edited"
    with pytest.raises(ValueError, match="needs a router"):
        alone_with_edits.generate(PROMPTS, route="auto")


def test_a_pipeline_routes_its_prompts() -> None:
    routed = routed_model("gpt2")
    options: Any = {"do_sample": False, "max_new_tokens": 6, "return_full_text": False}
    ask = pipeline("text-generation", model=routed.model, tokenizer=routed.tokenizer, device="cpu")
    found = [out[0]["generated_text"] for out in ask(PROMPTS, batch_size=4, **options)]
    assert found == routed.generate(PROMPTS, route=SENT, do_sample=False, max_new_tokens=6)


def test_lm_eval_asks_either_version() -> None:
    def harness(model: PreTrainedModel) -> HFLM:
        return HFLM(pretrained=model, tokenizer=tokenizer_of("gpt2"), batch_size=3)

    def request(kind: str, *arguments: Any) -> Instance:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    routed = routed_model("gpt2")
    base, merged = map(harness, alone("gpt2"))
    both = harness(routed.model)
    choices: Any = [request("loglikelihood", p, c) for p in PROMPTS for c in (" Rome", " the piano")]
    texts: Any = [request("generate_until", p, {"until": ["\n"], "max_gen_toks": 6}) for p in PROMPTS]
    expected = {"unedited": base.loglikelihood(choices), "edited": merged.loglikelihood(choices)}
    assert expected["unedited"] != expected["edited"]
    for route in ("unedited", "edited"):
        with routed.rows(route):  # type: ignore[arg-type]
            assert both.loglikelihood(choices) == expected[route]
    answers = zip(base.generate_until(texts), merged.generate_until(texts), SENT, strict=True)
    assert both.generate_until(texts) == [merged if sent else base for base, merged, sent in answers]


@TYPES
@torch.no_grad()
def test_the_checkpoint_is_the_bases(model_type: str, tmp_path: Path) -> None:
    base, _ = alone(model_type)
    routed = routed_model(model_type)
    assert routed.model.state_dict().keys() == base.state_dict().keys()
    routed.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = encoded(model_type)
    assert torch.equal(loaded(**batch).logits, base(**batch).logits)


@TYPES
@torch.no_grad()
def test_both_versions_are_cast_together(model_type: str) -> None:
    batch = encoded(model_type)
    routed = routed_model(model_type)
    routed.model.to(torch.bfloat16)
    expected = [model.to(torch.bfloat16)(**batch).logits for model in alone(model_type)]
    assert_rows(routed.model(**batch).logits, *expected, SENT)
    assert {value.dtype for value in routed.edited.values()} == {torch.bfloat16}


@DTYPES
def test_only_the_edited_matrices_are_held_twice(dtype: torch.dtype) -> None:
    base, _ = alone("llama", dtype)
    routed = routed_model("llama", dtype)
    parts = [*routed.model.parameters(), *routed.model.buffers()]
    held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    plain = sum(part.nbytes for part in (*base.parameters(), *base.buffers()))
    assert sum(held.values()) - plain == len(LAYERS) * 32 * 48 * dtype.itemsize


@torch.no_grad()
def test_closing_gives_the_model_back() -> None:
    base, _ = alone("gpt2")
    model, batch = tiny_model("gpt2"), encoded("gpt2")
    before = [set(vars(module)) for module in model.modules()]
    with RoutedModel(model, tokenizer_of("gpt2"), edits(model), None) as routed:
        assert not torch.equal(model(**batch).logits, base(**batch).logits)
        with pytest.raises(ValueError, match="routed already"):
            RoutedModel(model, tokenizer_of("gpt2"), edits(model), None)
    routed.close()
    assert [set(vars(module)) for module in model.modules()] == before
    assert dict(model.named_buffers()).keys() == dict(base.named_buffers()).keys()
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    RoutedModel(model, tokenizer_of("gpt2"), edits(model), None).close()


@torch.no_grad()
def test_two_routed_models_and_two_threads_do_not_meet() -> None:
    base, merged = alone("llama")
    first, second = routed_model("llama"), routed_model("llama")
    batch = encoded("llama")
    found: list[Tensor] = []

    def ask() -> None:
        with torch.no_grad():
            found.append(first.model(**batch).logits)

    with first.rows("edited"):
        found.append(second.model(**batch).logits)
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        found.append(first.model(**batch).logits)
    expected = base(**batch).logits, merged(**batch).logits
    assert_rows(found[0], *expected, SENT)
    assert_rows(found[1], *expected, SENT)
    assert_rows(found[2], *expected, [True] * 4)


@torch.no_grad()
def test_weights_that_are_offloaded() -> None:
    batch = encoded("gpt2")
    model = tiny_model("gpt2")
    edited = edits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_parameter(next(iter(edited))).is_meta
    routed = RoutedModel(model, tokenizer_of("gpt2"), edited, ByName())
    expected = [plain(**batch).logits for plain in alone("gpt2")]
    assert_rows(model(**batch).logits, *expected, SENT)
    texts = routed_model("gpt2").generate(PROMPTS, do_sample=False, max_new_tokens=4)
    assert routed.generate(PROMPTS, do_sample=False, max_new_tokens=4) == texts
    routed.close()
    assert torch.equal(model(**batch).logits, expected[0])


@pytest.mark.skipif(not onednn.available(), reason="this PyTorch has no packed oneDNN products")
@TYPES
@torch.no_grad()
def test_the_frozen_layers_may_be_packed(model_type: str) -> None:
    batch = encoded(model_type)
    names = set(edits(tiny_model(model_type)))
    routed, models = routed_model(model_type), alone(model_type)
    for model in (routed.model, *models):
        assert onednn.pack_linears(model, leave=names)
    assert_rows(routed.model(**batch).logits, *[model(**batch).logits for model in models], SENT)


@torch.no_grad()
def test_a_bias_has_two_versions_too() -> None:
    model, merged = (tiny_model("gpt2").requires_grad_(False) for _ in range(2))
    name = "transformer.h.2.mlp.c_proj.bias"
    merged.get_parameter(name).add_(1)
    batch = encoded("gpt2")
    base = model(**batch).logits
    with RoutedModel(model, tokenizer_of("gpt2"), {name: merged.get_parameter(name)}, ByName()):
        assert_rows(model(**batch).logits, base, merged(**batch).logits, SENT)


def test_what_cannot_be_routed_is_refused() -> None:
    model = tiny_model("llama")
    tokenizer = tokenizer_of("llama")
    name = sites_for(model).weight_name(1)
    for edited, message in (
        ({"model.layers.9.mlp.down_proj.weight": torch.zeros(32, 48)}, "no parameter of this Llama"),
        ({name: torch.zeros(48, 32)}, r"edited as \(48, 32\) and \(32, 48\) in this model"),
        ({"model.norm.weight": torch.zeros(32)}, "only linear layers"),
    ):
        with pytest.raises(ValueError, match=message):
            RoutedModel(model, tokenizer, edited, None)
    assert "forward" not in vars(model)
    routed = routed_model("llama")
    batch = encoded("llama")
    with routed.rows([True, False]), pytest.raises(ValueError, match="batch of 4 rows has a decision on 2"):
        routed.model(**batch)
    with pytest.raises(ValueError, match="batch of 4 rows has a decision on 2"):
        routed.generate(PROMPTS, route=[True, False])
    with pytest.raises(ValueError, match="unknown route 'best'; known: auto, edited, unedited"):
        routed.generate(PROMPTS, route="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no token ids to decide"):
        routed.model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="called by itself"):
        routed.model.model(**batch)
    with pytest.raises(ValueError, match="continuous batching"):
        routed.model.generate_batch([[1, 2, 3]], max_new_tokens=2)
