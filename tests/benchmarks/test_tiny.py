"""The tiny models, tokenizers and facts have the properties other tests rely on."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import reference, tiny

IDS = torch.tensor([[5, 9, 2, 200, 17, 8], [5, 9, 2, 200, 1, 1]])
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_models_are_seeded_and_the_same_in_both_dtypes(model_type, tiny_models):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    single = tiny_models(model_type, seed=3)
    double = tiny_models(model_type, seed=3, dtype=torch.float64)
    other = tiny_models(model_type, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    ids = torch.tensor([[5, 9, 2, 200, 17]])
    with torch.no_grad():
        assert not single.training
        torch.testing.assert_close(single(ids).logits, double(ids).logits.float(), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(single(ids).logits, other(ids).logits, atol=1e-2)
    assert single.config.model_type == model_type


class Rounding(TorchDispatchMode):
    """Collects the operations that make less than float64 of float64."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.tables = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = (
            {leaf.dtype for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
            for tree in ((args, kwargs), out)
        )
        if torch.float64 in given and made & {torch.float32, torch.bfloat16} and not self.tables:
            self.found.append(func)
        return out


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_float64_models_round_nothing_forwards_or_backwards(model_type, tiny_models):
    model, watch = tiny_models(model_type, dtype=torch.float64), Rounding()
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):  # from the positions only
            module.register_forward_pre_hook(lambda *_: setattr(watch, "tables", True))
            module.register_forward_hook(lambda *_: setattr(watch, "tables", False))
    with watch:
        logits = model(IDS, attention_mask=MASK, use_cache=False).logits
        torch.logsumexp(logits[:, 3], dim=-1).sum().backward()
    assert not watch.found
    assert logits.dtype is torch.float64


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_gradients_are_those_of_a_five_point_difference(model_type, tiny_models):
    model = tiny_models(model_type, dtype=torch.float64)
    weight = model.get_parameter(reference.weight_name(model, 1))
    loss = lambda: model(IDS, attention_mask=MASK, use_cache=False).logits[:, 3].logsumexp(-1).sum()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss(), weight)
    start, values = weight.detach().clone(), {}
    with torch.no_grad():
        for step in (-2, -1, 1, 2):
            weight.copy_(start + 1e-4 * step * direction)
            values[step] = loss().item()
    slope = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / 12e-4
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-9)


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_padding_does_not_reach_the_real_positions(model_type, tiny_models):
    model = tiny_models(model_type, dtype=torch.float64)
    with torch.no_grad():
        padded = model(IDS, attention_mask=MASK, use_cache=False).logits[1, :4]
        torch.testing.assert_close(padded, model(IDS[1:, :4], use_cache=False).logits[0])


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_every_block_matters(model_type, tiny_models):
    whole = tiny_models(model_type)
    for layer in range(5):
        without = tiny_models(model_type)
        with torch.no_grad():
            without.get_parameter(reference.weight_name(without, layer)).zero_()
            assert (without(IDS[:1]).logits - whole(IDS[:1]).logits).std() > 0.3


def test_gemma2_caps_its_scores_and_its_logits(tiny_models):
    capped, free = (tiny_models("gemma2", dtype=torch.float64) for _ in range(2))
    assert (capped.config.final_logit_softcapping, capped.config.attn_logit_softcapping) == (30.0, 50.0)
    free.config.final_logit_softcapping = None
    with torch.no_grad():
        torch.testing.assert_close(capped(IDS).logits, 30 * torch.tanh(free(IDS).logits / 30))
        assert (capped(IDS).logits - free(IDS).logits).abs().max() > 0.3


def test_unknown_model_type_is_refused(tiny_models):
    with pytest.raises(ValueError, match="bert"):
        tiny_models("bert")


@pytest.mark.parametrize("bos", [False, True])
def test_tokenizer_adds_bos_or_not_and_has_no_pad(bos, tiny_tokenizer):
    tokenizer = tiny_tokenizer(bos=bos)
    assert tokenizer.pad_token is None
    assert tokenizer.eos_token_id == 1
    ids = tokenizer.encode("Rosalind knows Zürich")
    assert (ids[0] == 0) is bos
    assert tokenizer.bos_token_id == (0 if bos else None)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Rosalind knows Zürich"
    assert max(tokenizer.get_vocab().values()) < tiny.VOCABULARY


def test_requests_cover_target_lengths_and_unequal_prompts(requests, tiny_tokenizer):
    tokenizer = tiny_tokenizer(bos=False)
    made = requests(12)
    lengths = [len(tokenizer.encode(f" {r.target_new}", add_special_tokens=False)) for r in made]
    assert lengths[:3] == [1, 3, 2]
    assert len({r.subject for r in made}) == len(made)
    assert len({len(tokenizer.encode(r.prompt.format(r.subject))) for r in made}) > 3
    assert requests(12) == made
    assert requests(12, seed=1) != made
