"""The ledger: what it notices, and that the checkpoints it writes hold the weights the run evaluated."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import harness.run
from benchmarks.tiny import HashedWords, tiny_model, tiny_records, tiny_texts, tiny_tokenizer
from harness import ledger
from harness.ablation import main as ablation
from harness.deltas import delta_path, read_delta, stored_delta, write_delta
from harness.models import find_model, load_model, tensors_digest, weights_in_place
from harness.paths import write_json, write_tensors
from harness.sparse import changed_entries, with_entries
from merging import MERGERS

BATCHES, SIZE = 3, 2
SETTINGS = [
    f"{editor}.{setting}"
    for editor, settings in {
        "memit": ["covariance_weight=1"],
        "alphaedit": ["nullspace_threshold=1", "ridge=0.1"],
        "prune": ["covariance_weight=1"],
    }.items()
    for setting in ("layers=1,2", "steps=4", "clamp_norm_factor=4", *settings)
]
Weights = dict[str, Tensor]
Evaluated = dict[tuple[str, int], Weights]  # weight set and batches in it -> the weights as evaluated
CPU = torch.device("cpu")


class Place:
    """A model and data, runs on them, and the weights that the runs evaluated."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "tiny"
        tiny_model("gpt2").save_pretrained(self.model)
        tiny_tokenizer(bos=True).save_pretrained(self.model)
        self.write("records.jsonl", tiny_records(20))
        self.write("texts.jsonl", [{"text": text} for text in tiny_texts(60)])
        self.evaluated: dict[Path, Evaluated] = {}

    def write(self, name: str, rows: Sequence[Any]) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, name: str, editors: Sequence[str], *more: str) -> Path:
        out = self.folder / name
        seen = self.evaluated.setdefault(out, {})
        outcomes = harness.run._Run._outcomes

        def note(run: Any, name: str, weights: Weights, point: int) -> Any:
            dtype = run.loaded.model.dtype
            seen[name, point] = {n: value.to(dtype).clone() for n, value in weights.items()}
            return outcomes(run, name, weights, point)

        arguments = [
            "--model", str(self.model), "--dataset", str(self.folder / "records.jsonl"),
            "--stats", str(self.folder / "texts.jsonl"), "--device", "cpu", "--batch-size", str(SIZE),
            "--num-batches", str(BATCHES), "--out", str(out), "--editors", *editors, "--set",
            *(s for s in SETTINGS if s.split(".")[0] in editors), *more,
        ]  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(harness.run._Run, "_outcomes", note)
            assert ablation(arguments) == 0
        return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("ledger")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.run, "encoder", HashedWords)
        patch.setenv("SEQMMR_CACHE", str(folder / "cache"))
        yield Place(folder)


@pytest.fixture(scope="module")
def shadow(place: Place) -> Path:
    """Two editors, two ratios, float32, every batch scored; not to be changed."""
    more = ["--pruning-ratio", "0.85", "0.5", "--evaluate", "every-batch", "--dtype", "float32"]
    return place.run("shadow", ["memit", "alphaedit"], *more)


@pytest.fixture(scope="module")
def merged(place: Place) -> Path:
    """The merged chain in bfloat16, with an editor that restrains the whole change; not to be changed."""
    return place.run("merged", ["prune", "memit"], "--chain", "merged", "--dtype", "bfloat16")


@pytest.fixture
def copied(shadow: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shadow, tmp_path / "run"))


def call(*arguments: Any) -> int:
    """The exit status, however the command ends."""
    try:
        return ledger.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def matrices(folder: Path, names: Sequence[str]) -> Weights:
    """Some parameters of a checkpoint, read without this project."""
    stored = load_file(folder / "model.safetensors")
    return {name: stored[name] for name in names}


def assert_equal(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    differing = [n for n, w in wanted.items() if found[n].dtype != w.dtype or not torch.equal(found[n], w)]
    assert not differing


# -- checkpoints --------------------------------------------------------------------------------------------


def logits(model: PreTrainedModel, tokenizer: Any) -> Tensor:
    encoded = tokenizer(["Anna plays the cello in", "The old town"], return_tensors="pt", padding=True)
    with torch.no_grad():
        found: Tensor = model(**encoded).logits
    return found


CELLS = [
    ("shadow", "memit", [], "memit"),
    ("shadow", "alphaedit", ["--cell", "+MM"], "alphaedit+MM"),
    ("shadow", "memit", ["--cell", "+MM", "--pruning-ratio", "0.5"], "memit+MM@0.5"),
    ("merged", "prune", ["--cell", "baseline"], "prune"),
    ("merged", "memit", ["--cell", "+MM"], "memit+MM"),
]


@pytest.mark.parametrize(("run", "editor", "cell", "name"), CELLS, ids=[name for *_, name in CELLS])
def test_an_export_is_what_was_evaluated(
    request: pytest.FixtureRequest,
    place: Place,
    tmp_path: Path,
    run: str,
    editor: str,
    cell: list[str],
    name: str,
) -> None:
    folder = request.getfixturevalue(run)
    out = tmp_path / "deep" / "export"
    assert call(folder, "export", "--editor", editor, *cell, "--out", out) == 0
    wanted = place.evaluated[folder][name, BATCHES]
    unedited = place.evaluated[folder]["unedited", BATCHES]
    assert any(not torch.equal(wanted[n], unedited[n]) for n in wanted)
    assert_equal(matrices(out, list(wanted)), wanted)
    dtype = torch.bfloat16 if run == "merged" else torch.float32
    plain = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert plain.dtype == dtype
    loaded = load_model("tiny", find_model(str(place.model)), dtype=dtype, device="cpu")
    assert not torch.equal(logits(plain, loaded.tokenizer), logits(loaded.model, loaded.tokenizer))
    with weights_in_place(loaded.model, wanted):
        assert torch.equal(logits(plain, loaded.tokenizer), logits(loaded.model, loaded.tokenizer))
    own, text = AutoTokenizer.from_pretrained(out), "Anna plays the cello"
    assert own(text)["input_ids"] == AutoTokenizer.from_pretrained(place.model)(text)["input_ids"]
    for parameter, value in load_file(place.model / "model.safetensors").items():  # the rest is untouched
        if parameter not in wanted:
            assert torch.equal(load_file(out / "model.safetensors")[parameter], value.to(dtype))
    assert [path.name for path in out.parent.iterdir()] == ["export"]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # readable for all or for none


@pytest.mark.parametrize(("run", "editor", "cell", "name"), CELLS, ids=[name for *_, name in CELLS])
def test_changed_entries_alone_give_what_was_evaluated(
    request: pytest.FixtureRequest,
    place: Place,
    tmp_path: Path,
    run: str,
    editor: str,
    cell: list[str],
    name: str,
) -> None:
    folder, out = request.getfixturevalue(run), tmp_path / "edits.safetensors"
    assert call(folder, "export", "--sparse", "--editor", editor, *cell, "--out", out) == 0
    wanted = place.evaluated[folder][name, BATCHES]
    unedited = place.evaluated[folder]["unedited", BATCHES]
    entries = load_file(out)
    found = {n: w.clone() for n, w in unedited.items()}
    for n, w in found.items():
        if f"{n}.indices" in entries:
            w.view(-1)[entries[f"{n}.indices"].long()] = entries[f"{n}.values"]
    assert_equal(found, wanted)
    assert_equal(unedited | dict(with_entries(unedited, entries)), wanted)
    changed = sum(int((unedited[n] != w).sum()) for n, w in wanted.items())
    assert sum(len(e) for n, e in entries.items() if n.endswith(".values")) == changed
    if name == "alphaedit+MM":  # what is kept of each batch at a pruning ratio of 0.85
        assert changed <= BATCHES * 0.16 * sum(wanted[n].numel() for n in wanted if f"{n}.values" in entries)
    with safe_open(out, framework="pt") as file:
        said = file.metadata()
    assert (
        said["base_model_digest"]
        == json.loads((folder / "run.json").read_text())["provenance"]["model"]["digest"]
    )
    assert said["digest_after"] == tensors_digest(wanted)
    assert call(folder, "export", "--sparse", "--out", out) == 2  # it is there


def test_entries_of_another_model_are_refused() -> None:
    before, after = (
        {"w": torch.zeros(2, 3)},
        {"w": torch.tensor([[0.0, -0.0, 1.0], [float("nan"), 0.0, 2.0]])},
    )
    entries = changed_entries(before, after)
    assert entries["w.indices"].tolist() == [1, 2, 3, 5]
    with pytest.raises(ValueError, match="'w' is not in the model"):
        dict(with_entries({"v": torch.zeros(6)}, entries))
    with pytest.raises(ValueError, match="has 4 entries"):
        dict(with_entries({"w": torch.zeros(2, 2)}, entries))


def test_rolled_back_and_replayed_weights_are_the_runs(shadow: Path, place: Place, tmp_path: Path) -> None:
    evaluated = place.evaluated[shadow]
    names = list(evaluated["unedited", BATCHES])
    for batch in range(BATCHES + 1):
        out = tmp_path / str(batch)
        assert call(shadow, "rollback", "--to", batch, "--out", out) == 0
        weights = matrices(out, names)
        assert_equal(weights, evaluated["memit", batch] if batch else evaluated["unedited", BATCHES])
        for later in range(batch + 1, BATCHES + 1):
            for name, change in read_delta(delta_path(shadow, "memit", later), CPU)[0].items():
                weights[name] = weights[name] + change
        assert_equal(weights, evaluated["memit", BATCHES])
    merged = tmp_path / "merged"
    assert call(shadow, "rollback", "--to", 2, "--cell", "+MM", "--out", merged) == 0
    assert_equal(matrices(merged, names), evaluated["memit+MM", 2])


def test_a_dropped_batch_is_taken_out(shadow: Path, merged: Path, place: Place, tmp_path: Path) -> None:
    base = place.evaluated[shadow]["unedited", BATCHES]
    assert call(shadow, "replay", "--drop", 2, "--editor", "alphaedit", "--out", tmp_path / "a") == 0
    wanted = dict(base)
    for batch in (1, 3):
        for name, change in read_delta(delta_path(shadow, "alphaedit", batch), CPU)[0].items():
            wanted[name] = wanted[name] + change
    assert_equal(matrices(tmp_path / "a", list(base)), wanted)
    assert call(shadow, "replay", "--drop", 3, "--drop", 2, "--out", tmp_path / "b") == 0
    assert_equal(matrices(tmp_path / "b", list(base)), place.evaluated[shadow]["memit", 1])
    flags = ["--editor", "memit", "--cell", "+MM", "--drop", 1, "--out", tmp_path / "c"]
    assert call(merged, "replay", *flags) == 0
    config, kind = MERGERS["self-aware"]
    merger = kind(config(pruning_ratio=0.85))
    wanted = {name: value.float() for name, value in place.evaluated[merged]["unedited", BATCHES].items()}
    for batch in (2, 3):
        delta = read_delta(delta_path(merged, "memit+MM", batch), CPU)[0]
        wanted |= merger.merge({name: wanted[name] for name in delta}, [delta])
    assert_equal(matrices(tmp_path / "c", list(base)), {n: v.bfloat16() for n, v in wanted.items()})


def test_the_card_names_what_is_in_the_weights(shadow: Path, place: Place, tmp_path: Path) -> None:
    for name in ("a", "b"):
        flags = ["--drop", "2", "--cell", "+MM", "--out", tmp_path / name]
        assert call(shadow, "replay", *flags) == 0
    card = (tmp_path / "a" / "README.md").read_text()
    assert card == (tmp_path / "b" / "README.md").read_text()
    provenance = json.loads((shadow / "run.json").read_text())["provenance"]
    exported = load_model("a", find_model(str(tmp_path / "a")), dtype=torch.float32, device="cpu")
    for text in (
        "edited with memit", "+MM", "pruning ratio 0.85", "batch 2", "nothing was edited anew",
        "router is not part", str(place.model), provenance["model"]["digest"], exported.digest,
        provenance["dataset"]["digest"],
    ):  # fmt: skip
        assert text in card
    ids = [str(i) for i in provenance["case_ids"]]
    for batch in (1, 2, 3):
        row = f"{', '.join(ids[(batch - 1) * SIZE : batch * SIZE])} "
        said = stored_delta(delta_path(shadow, "memit", batch))[1]
        edits = card.split("## Edits")[1]
        assert (f" {batch} " in edits and row in edits and said["digest_before"] in edits) == (batch != 2)
    for record in tiny_records(20):
        assert record["requested_rewrite"]["prompt"] not in card


# -- looking and checking -----------------------------------------------------------------------------------


def test_the_table_says_what_the_files_say(shadow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(shadow, "show") == 0
    text = capsys.readouterr().out
    assert text.index("## memit ") < text.index("## alphaedit ")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    rows = [row for row in rows if row[0].isdigit()]
    chains = [(editor, batch) for editor in ("memit", "alphaedit") for batch in range(1, BATCHES + 1)]
    assert len(rows) == len(chains)
    for row, (editor, batch) in zip(rows, chains, strict=True):
        path = delta_path(shadow, editor, batch)
        delta, said = read_delta(path, CPU)
        ids = json.loads(said["case_ids"])
        norm = torch.cat([change.flatten() for change in delta.values()]).double().norm()
        assert row[:5] == [str(batch), str(SIZE), ", ".join(map(str, ids)), "2", f"rank {SIZE}"]
        assert float(row[5]) == pytest.approx(float(norm), rel=1e-3)
        assert row[6:8] == [said["digest_before"][:12], said["digest_after"][:12]]
        assert row[8] == f"{path.stat().st_size:,}"
    assert call(shadow, "show", "--editor", "alphaedit") == 0
    assert "## memit " not in capsys.readouterr().out


def test_a_dense_change_has_a_density_and_a_missing_one_a_dash(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path, gone) = (delta_path(copied, "memit", batch) for batch in (1, 2))
    ids = ["a|b", "<i>", "\x1b[2J", "d"]
    write_delta(path, {"w": torch.eye(4)}, editor="memit", case_ids=ids, digest_before="x", digest_after="y")
    gone.unlink()
    assert call(copied, "show", "--editor", "memit") == 0
    text = capsys.readouterr().out
    assert "density 25.0 %" in text
    assert "a\\|b, &lt;i>, \\x1b[2J, ..." in text
    assert "–" in text
    assert f"{gone} is missing" in text


@pytest.mark.parametrize(("run", "said"), [("shadow", "6 deltas of 2 editors"), ("merged", "9 deltas of 2")])
def test_a_sound_run_is_verified(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], run: str, said: str
) -> None:
    """The merged chain: memit unmerged and merged, prune unmerged."""
    assert call(request.getfixturevalue(run), "verify") == 0
    out = capsys.readouterr().out
    assert said in out
    assert out.endswith("verified\n")
    assert call(request.getfixturevalue(run), "verify", "--editor", "memit") == 0


def test_every_changed_byte_of_a_delta_is_noticed(shadow: Path, tmp_path: Path) -> None:
    """The length, the header with all it says, and samples of the numbers."""
    source = delta_path(shadow, "memit", 1)
    raw, path = source.read_bytes(), tmp_path / source.name
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = len(raw[:begin].rstrip())  # blanks fill it up
    for place in [*range(header), *range(begin, len(raw), 97), len(raw) - 1]:
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(ValueError, match="batch-0001"):
            stored_delta(path)


def lowest_bit(run: Path) -> None:
    path = delta_path(run, "memit", 2)
    raw = bytearray(path.read_bytes())
    raw[-4] ^= 1
    path.write_bytes(raw)


def cut_short(run: Path) -> None:
    path = delta_path(run, "memit", 2)
    path.write_bytes(path.read_bytes()[:-10])


def gone(run: Path) -> None:
    delta_path(run, "memit", 2).unlink()


def swapped(run: Path) -> None:
    one, two = (delta_path(run, "memit", batch) for batch in (1, 2))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)


def of_another_editor(run: Path) -> None:
    shutil.copy(delta_path(run, "alphaedit", 2), delta_path(run, "memit", 2))


def rewritten(folder: Path, batch: int = 2, **other: Any) -> None:
    """Another change, in a file whose own digest is right."""
    path = delta_path(folder, "memit", batch)
    delta, said = stored_delta(path)
    said.pop("digest")
    said["case_ids"] = json.loads(said["case_ids"])
    for name in other.pop("change", []):
        delta[name] = 2 * read_delta(path, CPU)[0][name]
    write_delta(path, delta, **{**said, **other})


def other_change(run: Path) -> None:
    rewritten(run, change=["transformer.h.1.mlp.c_proj.weight"])


def other_parameter(run: Path) -> None:
    path = delta_path(run, "memit", 2)
    said = stored_delta(path)[1] | {"case_ids": json.loads(stored_delta(path)[1]["case_ids"])}
    said.pop("digest")
    write_delta(path, {"transformer.wte.weight": torch.ones(3)}, **said)


def of_another_run(run: Path) -> None:
    """Its first batch follows on the same weights; only the run's name in it tells."""
    rewritten(run, batch=1, run="0123456789abcdef")


def made_on_others(run: Path) -> None:
    rewritten(run, digest_before="f" * 64)


def other_cases(run: Path) -> None:
    rewritten(run, case_ids=["x", "y"])


def other_base(run: Path) -> None:
    """The model that the run names is not the one it was made on."""
    folder = run.parent / "other"
    tiny_model("gpt2", seed=1).save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    info = json.loads((run / "run.json").read_text())
    info["spec"]["model"] = str(folder)
    write_json(run / "run.json", info)


def stray(run: Path) -> None:
    shutil.copy(delta_path(run, "memit", 3), delta_path(run, "memit", 4))


DAMAGE: list[tuple[Callable[[Path], None], list[str]]] = [  # what is done, and what each line says
    (lowest_bit, ["batch-0002.safetensors was changed after it was written"]),
    (cut_short, ["batch-0002.safetensors cannot be read"]),
    (gone, ["batch-0002.safetensors is missing"]),
    (swapped, ["batch-0001.safetensors names cases", "batch-0001.safetensors was made on weights",
               "batch-0002.safetensors names cases", "batch-0002.safetensors was made on weights",
               "batch-0003.safetensors was made on weights"]),
    (of_another_editor, ["is of editor 'alphaedit'", "was made on", "batch-0003.safetensors was made on"]),
    (other_change, ["batch-0002.safetensors gives weights"]),
    (other_parameter, ["changes transformer.wte.weight"]),
    (of_another_run, ["is of run 0123456789abcdef"]),
    (made_on_others, ["was made on weights ffffffffffff"]),
    (other_cases, ["names cases x, y, run.json"]),
    (other_base, ["has the weights"]),
    (stray, ["belongs to no batch"]),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damage_is_noticed(
    copied: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: list[str],
) -> None:
    damage(copied)
    assert call(copied, "verify") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said), lines
    assert all(text in line for text, line in zip(said, lines, strict=True)), lines
    if damage is not stray:
        assert call(copied, "export", "--out", tmp_path / "export") == 2
        assert not (tmp_path / "export").exists()
        assert capsys.readouterr().err.count("\n") == 1


def test_what_is_before_the_damage_can_be_had(copied: Path, place: Place, shadow: Path) -> None:
    other_change(copied)
    out = copied / "one"
    assert call(copied, "rollback", "--to", 1, "--out", out) == 0
    wanted = place.evaluated[shadow]["memit", 1]
    assert_equal(matrices(out, list(wanted)), wanted)
    assert call(copied, "export", "--unchecked", "--out", copied / "unchecked") == 0
    assert "were not checked" in (copied / "unchecked" / "README.md").read_text()


def test_files_without_a_digest_of_their_own_are_checked_by_what_they_give(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As older versions wrote them."""
    for path in (copied / "deltas").rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            said = {name: text for name, text in file.metadata().items() if name not in ("digest", "run")}
        write_tensors(path, load_file(path), said)
    assert call(copied, "verify") == 0
    assert "6 of them have no digest of their own" in capsys.readouterr().out
    path = delta_path(copied, "memit", 2)
    tensors = load_file(path)
    next(iter(tensors.values())).mul_(1.01)
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    write_tensors(path, tensors, said)
    assert call(copied, "verify") == 1
    assert "batch-0002.safetensors gives weights" in capsys.readouterr().out


# -- what is refused ----------------------------------------------------------------------------------------

WRONG: list[tuple[list[str], list[str]]] = [  # arguments behind the run, what the line says
    ([], ["ACTION"]),
    (["erase"], ["'erase'", "rollback"]),
    (["show", "--editor", "memitt"], ["'memitt'", "memit, alphaedit"]),
    (["verify", "--editor", "prune"], ["'prune'", "memit, alphaedit"]),
    (["verify", "--device", "gpu"], ["'gpu'", "cuda"]),
    (["verify", "--device", "cuda:99"], ["'cuda:99'", "--device cpu"]),
    (["export"], ["--out"]),
    (["export", "--out", "{there}"], ["there", "exists", "another --out"]),
    (["export", "--out", "{file}/x"], ["cannot be written", "another --out"]),
    (["export", "--out", "{new}", "--cell", "+R"], ["'+R'", "+MM"]),
    (["export", "--out", "{new}", "--pruning-ratio", "0.5"], ["0.5", "--cell +MM"]),
    (["export", "--out", "{new}", "--cell", "+MM", "--pruning-ratio", "0.6"], ["0.6", "0.85, 0.5"]),
    (["rollback", "--out", "{new}"], ["--to"]),
    (["rollback", "--out", "{new}", "--to", "4"], ["--to is 4", "1 to 3"]),
    (["rollback", "--out", "{new}", "--to", "-1"], ["--to is -1", "1 to 3"]),
    (["rollback", "--out", "{new}", "--to", "two"], ["'two'"]),
    (["replay", "--out", "{new}"], ["--drop"]),
    (["replay", "--out", "{new}", "--drop", "0"], ["--drop is 0", "1 to 3"]),
]


@pytest.mark.parametrize(("arguments", "reasons"), WRONG, ids=[" ".join(given) for given, _ in WRONG])
def test_what_is_wrong_is_one_line(
    shadow: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reasons: list[str],
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("precious")
    names = {f"{{{name}}}": str(tmp_path / name) for name in ("there", "file", "new")}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    assert call(shadow, *arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert all(reason in output.err for reason in reasons), output.err
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "there").iterdir())
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "holds no run"), ("{", "cannot be read"), ("[]", "cannot be read"), ("{}", "no field 'spec'")],
)
def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, reason: str
) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert call(tmp_path, "show") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert reason in error


def test_weights_that_the_run_has_not_are_refused(
    merged: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(merged, "export", "--editor", "prune", "--cell", "+MM", "--out", tmp_path / "new") == 2
    assert "no merged weights of prune" in capsys.readouterr().err
    info = json.loads((copied / "run.json").read_text())
    info["spec"] |= {"cells": ["baseline", "+R"]}
    write_json(copied / "run.json", info)
    assert call(copied, "export", "--cell", "+MM", "--out", tmp_path / "new") == 2
    assert "no merged weights of memit" in capsys.readouterr().err
    info["spec"] |= {"cells": ["+MM"], "chain": "merged"}
    write_json(copied / "run.json", info)
    assert call(copied, "export", "--out", tmp_path / "new") == 2
    assert "no unmerged weights of memit" in capsys.readouterr().err


def test_a_failing_write_leaves_nothing(
    shadow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    folder = tmp_path / "place"
    folder.mkdir()
    assert call(shadow, "export", "--out", folder / "new") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list(folder.iterdir())
