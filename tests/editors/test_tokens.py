"""Where the subject ends, and what a target's ids are."""

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from benchmarks import reference, tiny
from editors.tokens import encode, locate_subject, target_ids


@pytest.mark.parametrize("bos", [False, True])
def test_the_subjects_last_token_is_that_of_the_length_rule(bos: bool) -> None:
    tokenizer = tiny.tiny_tokenizer(bos=bos)
    for request in tiny.tiny_requests(12):
        for template in (t for group in tiny.TEMPLATES for t in group):
            text = template.replace("{}", request.prompt)
            found = locate_subject(tokenizer, text, request.subject)
            assert found.subject_last == reference.subject_last_index(tokenizer, text, request.subject)
            before = tokenizer.decode(found.ids[: found.subject_last + 1], skip_special_tokens=True)
            assert before == text.split("{}")[0] + request.subject


def test_a_suffix_that_merges_with_the_subject(caplog: pytest.LogCaptureFixture) -> None:
    """The subject "xa" is one token by itself; before "b" its last letter goes with the b."""
    vocabulary = {piece: i for i, piece in enumerate(["x", "a", "b", "c", "ab", "xa"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("x", "a")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    apart = locate_subject(tokenizer, "{}cb", "xa")
    assert (apart.ids, apart.subject_last) == ((5, 3, 2), 0) and not caplog.text
    merged = locate_subject(tokenizer, "{}bc", "xa")
    assert (merged.ids, merged.subject_last) == ((0, 4, 3), 1)
    assert "1 by its characters and 0 by length" in caplog.text


def test_special_tokens_behind_a_prompt_are_left_out() -> None:
    tokenizer = tiny.tiny_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tiny.BOS} $A {tiny.EOS}", special_tokens=[(tiny.BOS, 0), (tiny.EOS, 1)]
    )
    ids = encode(tokenizer, "Anna lives in")
    assert ids[0] == 0 and ids[-1] != 1
    assert ids == encode(tiny.tiny_tokenizer(bos=True), "Anna lives in")


def test_targets_have_one_leading_space_and_no_special_tokens() -> None:
    tokenizer = tiny.tiny_tokenizer(bos=True)
    assert target_ids(tokenizer, "Rome") == target_ids(tokenizer, " Rome")
    assert tokenizer.decode(target_ids(tokenizer, "Rome")) == " Rome"
    with pytest.raises(ValueError, match="no tokens"):
        target_ids(tokenizer, " ")


@pytest.mark.parametrize("template", ["no place", "{} and {}"])
def test_a_template_needs_one_place(template: str) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        locate_subject(tiny.tiny_tokenizer(bos=False), template, "Anna")
