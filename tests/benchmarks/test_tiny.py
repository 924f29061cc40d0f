"""The tiny models, tokenizers and facts have the properties other tests rely on."""

import pytest
import torch

from benchmarks import tiny


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
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
