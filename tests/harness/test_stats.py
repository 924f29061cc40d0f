"""Second moments of keys: the figures, what is computed for them, and the files that keep them."""

import dataclasses
import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks import reference
from benchmarks.tiny import MODEL_TYPES, tiny_model, tiny_texts, tiny_tokenizer
from editors.linalg import null_space
from editors.sites import sites_for
from harness import stats, vault
from harness.models import LoadedModel, edit_in_float32, tokenizer_digest, weights_digest
from harness.stats import (
    Corpus,
    Covariance,
    Identity,
    Statistics,
    gather_covariances,
    gather_statistics,
    load_corpus,
    own_text,
    read_covariance,
    read_texts,
    sample_texts,
    write_covariance,
)

Write = Callable[..., Path]
TEXTS = tiny_texts(25)


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


def loaded_model(model_type: str = "gpt2", *, bos: bool = True, **kwargs: Any) -> LoadedModel:
    model = tiny_model(model_type, **kwargs)
    tokenizer = tiny_tokenizer(bos=bos)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=model_type,
        revision=None,
        digest=weights_digest(model),
        tokenizer_digest=tokenizer_digest(tokenizer),
    )


def gather(
    loaded: LoadedModel, layers: list[int], *, limit: int | None = None, max_length: int = 64
) -> dict[int, Covariance]:
    return gather_covariances(
        loaded.model, loaded.tokenizer, layers, TEXTS, limit=limit, max_length=max_length, progress=quiet
    )


# -- the figures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_layers_equal_the_literal_mean(model_type: str, bos: bool) -> None:
    loaded = loaded_model(model_type, bos=bos, dtype=torch.float64)
    found = gather(loaded, [1, 3, 2], max_length=30)
    count = sum(len(loaded.tokenizer(text)["input_ids"][:30]) for text in TEXTS)
    for layer in (1, 2, 3):
        wanted = reference.covariance(loaded.model, loaded.tokenizer, TEXTS, layer, 30)
        assert found[layer].matrix.dtype == torch.float64
        torch.testing.assert_close(found[layer].matrix, wanted, rtol=1e-10, atol=1e-10)
        assert torch.equal(found[layer].matrix, found[layer].matrix.T)
        assert found[layer].tokens == count


def test_the_size_of_a_pass_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model("llama", dtype=torch.float64)
    usual = gather(loaded, [1])[1].matrix
    for tokens in (1, 60):
        monkeypatch.setattr(stats, "PASS_TOKENS", tokens)
        torch.testing.assert_close(gather(loaded, [1])[1].matrix, usual, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("limit", [1, 17, 100])
def test_the_limit_cuts_to_the_token(limit: int) -> None:
    loaded = loaded_model(dtype=torch.float64)
    found = gather(loaded, [1], limit=limit)[1]
    assert found.tokens == limit
    rows, left = [], limit
    for text in TEXTS:
        row = loaded.tokenizer(text)["input_ids"][:64][:left]
        left -= len(row)
        if row:
            rows.append(row)
    total = torch.zeros(48, 48, dtype=torch.float64)
    for row in rows:
        with reference._recorded_input(reference._projection(loaded.model, 1)) as seen, torch.no_grad():
            loaded.model(torch.tensor([row]))
        total += seen[0][0].T @ seen[0][0]
    torch.testing.assert_close(found.matrix, total / limit, rtol=1e-10, atol=1e-10)


def test_a_limit_beyond_the_corpus_uses_all() -> None:
    loaded = loaded_model()
    assert gather(loaded, [1], limit=10**6)[1].tokens == gather(loaded, [1])[1].tokens


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_nothing_above_the_highest_layer_is_computed(model_type: str) -> None:
    loaded = loaded_model(model_type)
    sites = sites_for(loaded.model)
    entered: list[int] = []
    finished: list[int] = []
    for layer, block in enumerate(sites.blocks(loaded.model)):
        block.register_forward_pre_hook(lambda *_, layer=layer: entered.append(layer))
        sites.projection(loaded.model, layer).register_forward_hook(
            lambda *_, layer=layer: finished.append(layer)
        )
    gather(loaded, [0, 2])
    assert set(entered) == {0, 1, 2}
    assert set(finished) == {0, 1}  # the highest projection gives its input and is not computed


def test_no_hook_is_left_behind() -> None:
    loaded = loaded_model()
    gather(loaded, [1, 2])
    with pytest.raises(ValueError, match=r"layers \[9\]"):
        gather(loaded, [1, 9])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in loaded.model.modules())
    assert loaded.model(torch.tensor([[3, 4]])).logits.shape == (1, 2, 384)


def test_no_texts_are_refused() -> None:
    loaded = loaded_model(bos=False)
    with pytest.raises(ValueError, match="no tokens"):
        gather_covariances(
            loaded.model, loaded.tokenizer, [1], [""], limit=None, max_length=9, progress=quiet
        )


@pytest.mark.parametrize("edited_in_float32", [False, True])
def test_half_precision_keys_are_summed_in_float32_or_better(edited_in_float32: bool) -> None:
    loaded = loaded_model("llama", dtype=torch.bfloat16)
    if edited_in_float32:
        edit_in_float32(loaded.model, [sites_for(loaded.model).weight_name(1)])
    found = gather(loaded, [1])[1].matrix
    keys = []
    for text in TEXTS:
        with reference._recorded_input(reference._projection(loaded.model, 1)) as seen, torch.no_grad():
            loaded.model(torch.tensor([loaded.tokenizer(text)["input_ids"][:64]]))
        keys.append(seen[0][0].double())
    exact = sum(k.T @ k for k in keys) / sum(len(k) for k in keys)
    # The keys themselves differ between batch shapes by bfloat16's rounding; sums in bfloat16 would be off
    # by far more than this.
    assert (found - exact).norm() / exact.norm() < 2e-3
    assert not torch.equal(found, found.bfloat16().double())


# -- the files ----------------------------------------------------------------------------------------------


def identity(**changes: Any) -> Identity:
    fields: dict[str, Any] = {
        "model": "abc", "tokenizer": "t", "parameter": "h.1.weight", "corpus": "self",
        "corpus_digest": "d", "limit": 100, "max_length": 64, "dtype": "torch.float32",
    }  # fmt: skip
    return Identity(**fields | changes)


def made_up() -> Covariance:
    return Covariance(matrix=torch.eye(3, dtype=torch.float64) / 3, tokens=77)


def test_what_is_written_is_read_back_to_the_bit() -> None:
    write_covariance(identity(), made_up())
    found = read_covariance(identity())
    assert torch.equal(found.matrix, made_up().matrix)
    assert found.matrix.dtype == torch.float64
    assert found.tokens == 77


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Identity)])
def test_every_part_of_an_identity_has_a_path_of_its_own(field: str) -> None:
    other = identity(**{field: 7 if field in ("limit", "max_length") else "other"})
    assert other.path != identity().path
    assert identity().path == identity().path


def test_no_limit_and_a_limit_have_different_paths() -> None:
    assert identity(limit=None).path != identity().path


def rewrite(change: Callable[[dict[str, str], torch.Tensor], tuple[dict[str, str], torch.Tensor]]) -> None:
    path = identity().path
    with safe_open(path, framework="pt") as file:
        metadata, matrix = change(file.metadata(), file.get_tensor("covariance"))
    save_file({"covariance": matrix}, path, metadata)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def lie_about_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        cut_header,
        lie_about_header,
        lambda path: path.write_bytes(b""),
        lambda path: save_file({"other": torch.zeros(2)}, path, {"tokens": "3"}),
        lambda _: rewrite(lambda m, t: (m | {"identity": m["identity"].replace("abc", "abd")}, t)),
        lambda _: rewrite(lambda m, t: (m | {"identity": "{broken"}, t)),
        lambda _: rewrite(lambda m, t: (m | {"identity": "[1]"}, t)),
        lambda _: rewrite(lambda m, t: ({"tokens": m["tokens"]}, t)),
        lambda _: rewrite(lambda m, t: ({"identity": m["identity"]}, t)),
        lambda _: rewrite(lambda m, t: (m | {"tokens": "many"}, t)),
        lambda _: rewrite(lambda m, t: (m, t.index_fill(0, torch.tensor([1]), float("nan")))),
        lambda _: rewrite(lambda m, t: (m, t.index_fill(0, torch.tensor([1]), float("inf")))),
        lambda _: rewrite(lambda m, t: (m, 2 * t)),
    ],
    ids=[
        "cut", "cut header", "false header", "empty", "other tensor", "other identity", "broken identity",
        "listed identity", "no identity", "no count", "no number", "nan", "inf", "other numbers",
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_should_be_is_refused(damage: Callable[[Path], object]) -> None:
    write_covariance(identity(), made_up())
    damage(identity().path)
    with pytest.raises(ValueError, match="statistics file") as error:
        read_covariance(identity())
    text = str(error.value)
    assert "\n" not in text
    assert str(identity().path) in text
    assert "delete it" in text


def test_a_file_under_another_files_name_is_refused() -> None:
    write_covariance(identity(), made_up())
    other = identity(limit=200)
    identity().path.rename(other.path)
    with pytest.raises(ValueError, match="is of"):
        read_covariance(other)


def corpus(texts: list[str] = TEXTS) -> Corpus:
    return Corpus(name="texts", digest=str(hash(tuple(texts))), texts=tuple(texts))


def test_only_missing_layers_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model(dtype=torch.float64)
    asked: list[list[int]] = []
    plain = gather_covariances

    def noted(model: Any, tokenizer: Any, layers: list[int], *args: Any, **kwargs: Any) -> Any:
        asked.append(list(layers))
        return plain(model, tokenizer, layers, *args, **kwargs)

    monkeypatch.setattr(stats, "gather_covariances", noted)
    first = gather_statistics(loaded, [1, 2], corpus(), limit=90, progress=quiet)
    again = gather_statistics(loaded, [1, 2, 3], corpus(), limit=90, progress=quiet)
    gather_statistics(loaded, [3, 1], corpus(), limit=90, progress=quiet)
    assert asked == [[1, 2], [3]]
    assert list(again.identities) == [1, 2, 3]
    assert torch.equal(first.covariance(2), again.covariance(2))
    gather_statistics(loaded, [1], corpus(), limit=91, progress=quiet)
    gather_statistics(loaded, [1], corpus(TEXTS[:9]), limit=90, progress=quiet)
    gather_statistics(loaded_model(seed=1, dtype=torch.float64), [1], corpus(), limit=90, progress=quiet)
    assert asked[2:] == [[1], [1], [1]]


def test_texts_are_cut_to_the_models_context() -> None:
    loaded = loaded_model("gpt2")
    long = Corpus(name="long", digest="1", texts=("Rome and Paris " * 400,))
    assert gather_statistics(loaded, [1], long, limit=None, progress=quiet).tokens == 256


@pytest.mark.parametrize("rank", [2, 5], ids=["small", "large"])
def test_a_projector_is_made_once_and_comes_back_to_the_bit(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.tensor([1e-3] * rank + [1.0] * (7 - rank), dtype=torch.float64)
    basis = torch.linalg.qr(
        torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )[0]
    write_covariance(identity(), Covariance(matrix=(basis * values) @ basis.T, tokens=9))
    statistics = Statistics(corpus=corpus(), identities={1: identity()}, tokens=9, device=torch.device("cpu"))
    made = null_space(statistics.covariance(1), 0.02)
    first = statistics.null_space(1, 0.02)
    with monkeypatch.context() as patch:
        patch.setattr(stats, "null_space", lambda *_: pytest.fail("it is kept"))
        for found in (first, statistics.null_space(1, 0.02)):
            assert torch.equal(found.basis, made.basis)
            assert (found.complement, found.rank) == (made.complement, rank)
    assert statistics.null_space(1, 2.0).rank == 7  # another threshold is another file
    assert len(list(identity().path.parent.iterdir())) == 3


# -- the vault ----------------------------------------------------------------------------------------------


@pytest.fixture
def filled() -> Path:
    """A covariance, a projector of it, one of another model, and one of an older version."""
    write_covariance(identity(), made_up())
    Statistics(corpus=corpus(), identities={1: identity()}, tokens=77, device=torch.device("cpu")).null_space(
        1, 0.5
    )
    write_covariance(identity(model="xyz"), made_up())
    rewritten = identity(corpus="older")
    write_covariance(rewritten, made_up())
    with safe_open(rewritten.path, framework="pt") as file:
        said = {name: text for name, text in file.metadata().items() if name != "digest"}
    save_file({"covariance": made_up().matrix}, rewritten.path, said)
    return identity().path.parent


def test_the_vault_lists_and_verifies_what_is_kept(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vault.main(["list"]) == 0
    out = capsys.readouterr().out
    assert out.count("covariance") == 3 and out.count("projector") == 1
    assert "h.1.weight" in out and "77" in out and "4 files" in out
    assert vault.main(["verify"]) == 0
    assert "4 files verified; 1 of older versions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "is broken"),
        (lambda path: path.write_bytes(b""), "is broken"),
        (lambda path: path.rename(path.with_name("other.safetensors")), "is of"),
        (lambda _: rewrite(lambda m, t: (m, 2 * t)), "changed after it was written"),
        (lambda _: write_covariance(identity(), Covariance(matrix=torch.eye(3)[:2], tokens=1)), "not square"),
        (
            lambda _: write_covariance(identity(), Covariance(matrix=-torch.eye(3), tokens=1)),
            "no second moment",
        ),
    ],
    ids=["cut", "empty", "renamed", "changed", "oblong", "negative"],
)
def test_broken_files_are_named_and_removed_on_request(
    filled: Path, damage: Callable[[Path], object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(identity().path)
    assert vault.main(["verify"]) == 1
    out = capsys.readouterr().out
    assert words in out and "1 of 4 files are broken" in out
    assert vault.main(["prune", "--broken"]) == 0
    assert "1 files removed" in capsys.readouterr().out
    assert vault.main(["verify"]) == 0
    assert len(list(filled.iterdir())) == 3


def test_pruning_takes_what_all_conditions_select(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vault.main(["prune"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--broken, --model DIGEST" in error
    os.utime(identity().path, (0, 0))
    assert vault.main(["prune", "--model", "xy", "--older-than", "1"]) == 0
    assert len(list(filled.iterdir())) == 4
    assert vault.main(["prune", "--model", "abc", "--older-than", "1"]) == 0
    assert not identity().path.exists()
    assert vault.main(["prune", "--all"]) == 0
    assert not list(filled.iterdir())


def test_sampled_texts_are_in_the_vault_too(
    filled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stats, "SAMPLE_BATCH", 2)
    monkeypatch.setattr(stats, "SAMPLE_LENGTH", 5)
    loaded = loaded_model()
    folder = filled.parent / "samples"
    made = own_text(loaded, tokens=10, seed=0, progress=quiet)
    (kept,) = folder.iterdir()
    assert vault.main(["verify"]) == 0
    assert vault.main(["list"]) == 0
    out = capsys.readouterr().out
    assert "5 files verified" in out and f"| text       | {loaded.digest[:12]} |" in out
    cut(kept)
    assert vault.main(["verify"]) == 1
    assert kept.name in capsys.readouterr().out
    with pytest.raises(ValueError, match="vault prune --broken"):
        own_text(loaded, tokens=10, seed=0, progress=quiet)
    assert vault.main(["prune", "--broken"]) == 0
    assert not list(folder.iterdir())
    assert own_text(loaded, tokens=10, seed=0, progress=quiet) == made
    assert vault.main(["prune", "--model", loaded.digest]) == 0  # of which the file's name has the beginning
    assert not list(folder.iterdir())
    assert len(list(filled.iterdir())) == 4


def test_what_a_killed_write_left_goes_a_day_later(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left, going = (filled / f".{identity().path.name}.{end}" for end in ("abc", "def"))
    left.write_bytes(b"half"), going.write_bytes(b"half")
    os.utime(left, (0, 0))
    assert vault.main(["verify"]) == 1
    assert "was left by a process that was stopped" in capsys.readouterr().out
    assert vault.main(["prune", "--broken"]) == 0
    assert going.exists() and not left.exists()
    assert vault.main(["verify"]) == 0


# -- corpora ------------------------------------------------------------------------------------------------


def test_a_file_of_texts_is_a_corpus_in_a_seeded_order(write_jsonl: Write, tmp_path: Path) -> None:
    path = write_jsonl([{"text": text, "title": "x"} for text in TEXTS], "wiki.jsonl")
    loaded = loaded_model()
    made = [load_corpus(str(path), loaded, limit=9, seed=seed, progress=quiet) for seed in (0, 0, 1)]
    assert made[0] == made[1]
    assert sorted(made[0].texts) == sorted(made[2].texts) == sorted(TEXTS)
    assert made[0].texts != made[2].texts
    assert made[0].digest != made[2].digest
    assert made[0].name == "wiki.jsonl"
    packed = tmp_path / "wiki.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert load_corpus(str(packed), loaded, limit=9, seed=0, progress=quiet).texts == made[0].texts


@pytest.mark.parametrize("record", [{}, {"text": ""}, {"text": " \n"}, {"text": None}, {"text": ["a"]}])
def test_a_record_without_text_is_named(write_jsonl: Write, record: dict[str, Any]) -> None:
    path = write_jsonl([{"text": "fine"}, {"text": "fine too"}, record], "wiki.jsonl")
    with pytest.raises(ValueError, match=r"wiki\.jsonl', record 3: field 'text'") as error:
        read_texts(str(path))
    assert "\n" not in str(error.value)


def test_an_unreachable_wikipedia_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        assert args == stats.WIKIPEDIA_HUB[:2]
        assert kwargs["revision"] == stats.WIKIPEDIA_HUB[2]
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError, match=r"wikipedia.*cannot be fetched: no route at all.*--stats self"
    ) as error:
        load_corpus("wikipedia", loaded_model(), limit=None, seed=0, progress=quiet)
    assert "\n" not in str(error.value)


def test_wikipedia_is_shuffled_as_the_protocol_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    import datasets

    articles = [{"text": f"article {i}"} for i in range(50)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: articles)
    monkeypatch.setattr(stats, "WIKIPEDIA_ARTICLES", 20)
    order = list(range(50))
    random.Random(1).shuffle(order)
    found = load_corpus("wikipedia", loaded_model(), limit=None, seed=5, progress=quiet)
    assert list(found.texts) == [f"article {i}" for i in order[:20]]
    assert found.name == "wikipedia"


# -- a model's own text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_own_text_is_seeded_and_long_enough(monkeypatch: pytest.MonkeyPatch, bos: bool) -> None:
    monkeypatch.setattr(stats, "SAMPLE_BATCH", 2)
    monkeypatch.setattr(stats, "SAMPLE_LENGTH", 20)
    loaded = loaded_model(bos=bos)
    made = [
        list(sample_texts(loaded.model, loaded.tokenizer, tokens=60, seed=seed, progress=quiet))
        for seed in (0, 0, 1)
    ]
    assert made[0] == made[1] != made[2]
    assert sum(len(loaded.tokenizer(text)["input_ids"]) for text in made[0]) >= 60
    assert not any("<|" in text for text in made[0])


def test_sampling_leaves_the_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "SAMPLE_BATCH", 2)
    monkeypatch.setattr(stats, "SAMPLE_LENGTH", 5)
    loaded = loaded_model()
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    list(sample_texts(loaded.model, loaded.tokenizer, tokens=5, seed=9, progress=quiet))
    assert torch.equal(torch.rand(2), wanted)


def test_own_text_is_sampled_once_a_model_seed_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[tuple[int, int]] = []

    def sample(*_: Any, tokens: int, seed: int, **__: Any) -> list[str]:
        sampled.append((tokens, seed))
        return [f"text {seed}", "of é"]

    monkeypatch.setattr(stats, "sample_texts", sample)
    loaded = loaded_model()
    for _ in range(2):
        assert own_text(loaded, tokens=10, seed=0, progress=quiet) == ["text 0", "of é"]
    assert sampled == [(10, 0)]
    own_text(loaded, tokens=10, seed=1, progress=quiet)
    own_text(loaded, tokens=11, seed=0, progress=quiet)
    own_text(loaded_model(seed=1), tokens=10, seed=0, progress=quiet)
    assert sampled == [(10, 0), (10, 1), (11, 0), (10, 0)]


def test_shipped_text_is_used_where_there_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = loaded_model()
    monkeypatch.setattr(stats, "SAMPLES", tmp_path)
    monkeypatch.setattr(stats, "sample_texts", lambda *_, **__: ["sampled"])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / f"{loaded.name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert own_text(loaded, tokens=50, seed=0, progress=quiet) == TEXTS
    assert own_text(loaded, tokens=10**6, seed=0, progress=quiet) == ["sampled"]
    for name in ("other", str(tmp_path / loaded.name)):  # a path is no shipped name
        other = dataclasses.replace(loaded, name=name)
        assert own_text(other, tokens=50, seed=0, progress=quiet) == ["sampled"]
