"""Editing from a file, end to end on a tiny model: what is written, taken back, asked, exported."""

import csv
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import harness
import harness.edited
import harness.served
from benchmarks.reference.merging import merge_shadow
from benchmarks.tiny import HashedWords, tiny_records, tiny_texts
from editors.closed_form import ClosedFormStream
from editors.sites import sites_for
from harness import ask, edit, ledger
from harness.factfile import Fact, read_facts
from harness.paths import read_lines, read_tensors
from harness.sparse import with_entries

SETTINGS = [
    "alphaedit.layers=1,2", "alphaedit.steps=20", "alphaedit.nullspace_threshold=1", "alphaedit.ridge=0.1",
    "alphaedit.clamp_norm_factor=8",
]  # fmt: skip
Write = Callable[..., Path]
Row = dict[str, Any]


def rows(count: int) -> list[Row]:
    """Facts as lines of a file, without ids; prompts with and without {}."""
    found = []
    for number, record in enumerate(tiny_records(count)):
        rewrite = record["requested_rewrite"]
        prompt = rewrite["prompt"]
        found.append({
            "prompt": prompt if number % 2 else prompt.replace("{}", rewrite["subject"]),
            "subject": rewrite["subject"],
            "target_new": rewrite["target_new"]["str"],
            "target_true": rewrite["target_true"]["str"],
            "paraphrases": record["paraphrase_prompts"],
            "unrelated": record["neighborhood_prompts"][:2],
        })  # fmt: skip
    return found


@pytest.fixture(autouse=True)
def _encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (harness.edited, harness.served):
        monkeypatch.setattr(module, "encoder", HashedWords)


@pytest.fixture
def editing(tmp_path: Path, tiny_folder: Path, write_jsonl: Write) -> Callable[..., int]:
    """``editing("a", rows)``: the command with these facts into tmp_path/a; its exit status."""
    texts = write_jsonl([{"text": text} for text in tiny_texts(60)], "texts.jsonl")
    calls = iter(range(1000))

    def run(out: str, facts: Sequence[Row] = (), *more: str, batch_size: int = 2) -> int:
        given = ["--out", str(tmp_path / out), *more]
        if facts:
            given += ["--facts", str(write_jsonl(facts, f"facts-{next(calls)}.jsonl"))]
            given += ["--batch-size", str(batch_size)]
        if not (tmp_path / out / "manifest.json").is_file():
            given += [
                "--model",
                str(tiny_folder),
                "--stats",
                str(texts),
                "--device",
                "cpu",
                "--set",
                *SETTINGS,
            ]
        try:
            return edit.main(given)
        except SystemExit as end:
            return int(end.code or 0)

    return run


def served_files(folder: Path) -> list[str]:
    """Their names say what is in them."""
    return sorted(path.name for path in folder.glob("*.safetensors"))


def weights_file(folder: Path) -> str:
    [path] = folder.glob("edits-*")
    return path.name


# -- files of facts -----------------------------------------------------------------------------------------


def test_csv_and_jsonl_say_the_same(tmp_path: Path, write_jsonl: Write) -> None:
    facts = rows(6)
    facts[2] |= {"id": "mine", "unrelated": []}
    facts[3] |= {"paraphrases": ["One, with a comma", 'and "two"']}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["id", *facts[0]])
    writer.writeheader()
    for number, fact in enumerate(facts):
        lists = {n: (json.dumps if number % 2 else "\n".join)(fact[n]) for n in ("paraphrases", "unrelated")}
        writer.writerow({**fact, **lists})
    path = tmp_path / "facts.csv"
    path.write_text(text.getvalue(), encoding="utf-8-sig", newline="")
    found = read_facts(path)
    assert found == read_facts(write_jsonl(facts))
    assert [fact.id for fact in found] == [1, 2, "mine", 4, 5, 6]
    for fact, row in zip(found, facts, strict=True):
        assert fact.text == row["prompt"].replace("{}", row["subject"])
        assert fact.prompt.count("{}") == 1
        assert fact.prompt.replace("{}", fact.subject) == fact.text


WRONG: list[tuple[Row, str]] = [
    ({"prompt": None}, "record 2: field 'prompt' is None"),
    ({"prompt": "  "}, "prompt: '  ' is not a text"),
    ({"prompt": "Nobody was born in"}, "is not in prompt 'Nobody was born in'"),
    ({"prompt": "{} and {} were born in"}, "has {} 2 times"),
    ({"subject": ""}, "subject: '' is not a text"),
    ({"subject": "a{}b"}, "marks its place"),
    ({"target_new": " "}, "target_new: ' ' is not a text"),
    ({"target_new": "Rome", "target_true": "Rome"}, "there is nothing to edit"),
    ({"target_new": ["Rome"]}, "field 'target_new' is ['Rome'], not a str"),
    ({"target_true": 3}, "target_true: 3 is not a text"),
    ({"paraphrases": "one"}, "field 'paraphrases' is 'one'"),
    ({"paraphrases": ["{} lives"]}, "still has {}"),
    ({"unrelated": [""]}, "unrelated[0]: '' is not a text"),
    ({"id": 1.5}, "id 1.5 is neither a number nor a text"),
    ({"id": True}, "id True is neither"),
    ({"id": ""}, "id '' is not a text"),
    ({"id": 1}, "has the id 1 of record 1"),
    ({"subjekt": "x"}, "unknown field 'subjekt'; known: id, prompt"),
    ({"prompt": "a\0b"}, "null character"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_wrong_fact_is_refused_in_one_line(
    change: Row, message: str, editing: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = rows(2)
    assert editing("out", [facts[0], {**facts[1], **change}]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("harness.edit: facts facts-0.jsonl, record 2")
    assert message in line


def test_two_facts_of_one_prompt_are_refused(write_jsonl: Write) -> None:
    one = rows(1)[0]
    with pytest.raises(ValueError, match="record 2: has the prompt of record 1"):
        read_facts(write_jsonl([one, {**one, "target_new": "elsewhere"}]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("prompt,subject,target_new\n", "has no rows"),
        ("prompt,prompt\na,b\n", "column 'prompt' occurs twice"),
        ("prompt,subject,target_new\na,b\n", "line 2: the row has not the header's 3 cells"),
        ("prompt,subject,target_new\na,b,c,d\n", "line 2: the row has not the header's 3 cells"),
        ('prompt,subject,target_new\n"a"x,b,c\n', "line 2: "),
        ('prompt,subject,target_new,unrelated\nAnna sings,Anna,well,"[1"\n', "is no JSON list"),
    ],
)
def test_a_broken_csv_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="facts") as refused:
        read_facts(path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


# -- the folder ---------------------------------------------------------------------------------------------


def test_calls_add_up(editing: Callable[..., int], tmp_path: Path) -> None:
    """Three calls leave what one in the same batches leaves, to the byte; said again they change nothing."""
    facts = rows(6)
    for part in (facts[:2], facts[2:4], facts[4:]):
        editing("three", part)
    editing("one", facts)
    assert served_files(tmp_path / "three") == served_files(tmp_path / "one")
    facts_file = (tmp_path / "three" / "facts.jsonl").read_bytes()
    assert facts_file == (tmp_path / "one" / "facts.jsonl").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "deltas").rglob("*.safetensors")}
    editing("one", [{**fact, "id": number} for number, fact in enumerate(facts, start=1)])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(served_files(tmp_path / "one")) == 2


def test_what_is_taken_back_never_was(editing: Callable[..., int], tmp_path: Path) -> None:
    """A fact of the first batch, a whole batch, and all after a batch, each as in a folder made without."""
    facts = [{**fact, "id": f"f{number}"} for number, fact in enumerate(rows(6))]
    editing("all", facts)
    for name in ("one", "back"):
        shutil.copytree(tmp_path / "all", tmp_path / name)
    editing("one", [], "--remove", "f1")
    editing("without-one", [facts[0]])
    editing("without-one", facts[2:])
    assert weights_file(tmp_path / "one") == weights_file(tmp_path / "without-one")
    editing("one", [], "--remove", "f0", "f5")
    editing("without-three", facts[2:4])
    editing("without-three", facts[4:5])
    assert weights_file(tmp_path / "one") == weights_file(tmp_path / "without-three")
    routed, _ = harness.load(tmp_path / "one")
    for fact in read_facts_of(tmp_path / "all"):
        [decision] = routed.route([fact.text])
        assert (decision.expert is None) == (fact.id in ("f0", "f1", "f5"))
    editing("one", [facts[1]])  # and in again
    routed, _ = harness.load(tmp_path / "one")
    assert routed.route([read_facts_of(tmp_path / "all")[1].text])[0].expert == "edited"
    editing("back", [], "--rollback", "1")
    editing("first", facts[:2])
    assert weights_file(tmp_path / "back") == weights_file(tmp_path / "first")
    assert editing("back", [], "--rollback", "0") == 0
    routed, tokenizer = harness.load(tmp_path / "back")
    assert not routed.edited
    assert len(routed.generate(["Anna Abel plays"], max_new_tokens=2)) == 1
    assert tokenizer.pad_token is not None
    assert ledger.main([str(tmp_path / "back"), "verify"]) == 0


def test_a_stopped_call_goes_on(
    editing: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = rows(6)
    editing("whole", facts)
    whole = ClosedFormStream.edit
    calls = iter(range(100))

    def stopped(stream: Any, *args: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return whole(stream, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ClosedFormStream, "edit", stopped)
        assert editing("cut", facts) == 130
    assert not (tmp_path / "cut" / "manifest.json").is_file()
    editing("cut", facts)  # the same command
    assert served_files(tmp_path / "cut") == served_files(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(ClosedFormStream, "edit", stopped)
        calls = iter([1])
        assert editing("cut", [], "--remove", "1") == 130
    harness.load(tmp_path / "cut")  # what was served is served still
    editing("cut", [], "--remove", "1")  # the same command is no mistake
    editing("less", facts[1:2])
    editing("less", facts[2:])
    assert weights_file(tmp_path / "cut") == weights_file(tmp_path / "less")


def test_a_later_fact_takes_the_place_of_an_earlier_one(
    editing: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = rows(2)
    editing("out", facts)
    editing("out", [{**facts[0], "target_new": "Lima", "id": "newer"}])
    assert "newer takes the place of 1" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert [row["id"] for row in found["facts"]] == ["newer", 2]
    [corpus] = (tmp_path / "out").glob("router-*")
    texts = json.loads(read_tensors(corpus)[1]["texts"])
    assert [fact for _, fact in texts if fact is not None] == ["newer", 2]


def test_what_cannot_be_done_is_one_line(
    editing: Callable[..., int], tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = rows(2)
    editing("out", facts)
    capsys.readouterr()
    for given, message in (
        (([], "--remove", "9"), "--remove is '9'; the folder has the facts 1, 2"),
        (([], "--rollback", "2"), "--rollback is 2; the folder has batches 1 to 1"),
        (([], "--editor", "memit"), "was made otherwise (editors: ('alphaedit',) there, ('memit',) now"),
        (([], "--pruning-ratio", "0.5"), "pruning_ratio: (0.85,) there, (0.5,) now"),
        (([], "--set", *SETTINGS, "alphaedit.ridge=7"), "settings: "),
        (([{**facts[0], "target_new": "Oslo", "id": 1}],), "fact 1 is in the folder with other words"),
    ):
        assert editing("out", *given) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
    assert editing("new") == 2
    assert "has no facts yet" in capsys.readouterr().err
    assert edit.main(["--out", str(tmp_path / "out"), "--model", str(tiny_folder)]) in (0, 1)
    assert editing("out", facts, batch_size=0) == 2


# -- what is served -----------------------------------------------------------------------------------------


@pytest.fixture
def made(editing: Callable[..., int], tmp_path: Path) -> Path:
    editing("made", rows(6))
    return tmp_path / "made"


def literal_weights(folder: Path, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The merged weights from the deltas, by the literal formula."""
    deltas = [read_tensors(path)[0] for path in sorted((folder / "deltas" / "alphaedit").iterdir())]
    return {
        name: merge_shadow(
            value,
            *((d[f"{name}.left"].double() @ d[f"{name}.right"].double()).float() for d in deltas),
            ratio=0.85,
        )
        for name, value in base.items()
    }


def test_the_served_model_is_the_merged_one_where_it_routes(made: Path, tiny_folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    names = [sites_for(plain).weight_name(layer) for layer in (1, 2)]
    base = {name: plain.get_parameter(name).detach().clone() for name in names}
    literal = literal_weights(made, base)
    [file] = made.glob("edits-*")
    entries = read_tensors(file)[0]
    for name, value in with_entries(base, entries):
        torch.testing.assert_close(value, literal[name].float(), rtol=0, atol=1e-6)
    routed, tokenizer = harness.load(made)
    ids = torch.tensor([tokenizer("Anna Abel plays in the old town")["input_ids"]])
    with torch.no_grad():
        unedited = plain(ids).logits
        for name, value in with_entries(base, entries):
            plain.get_parameter(name).copy_(value)
        edited = plain(ids).logits
        with routed.rows("unedited"):
            torch.testing.assert_close(routed.model(ids).logits, unedited, rtol=0, atol=1e-5)
        with routed.rows("edited"):
            torch.testing.assert_close(routed.model(ids).logits, edited, rtol=0, atol=1e-5)
    assert (edited - unedited).abs().max() > 1e-2


def test_the_check_says_what_greedy_generation_does(made: Path) -> None:
    routed, _ = harness.load(made)
    found = json.loads((made / "check.json").read_text())
    facts = [
        Fact.from_json({k: v for k, v in row.items() if k != "batch"}, "", 0)
        for row in read_lines(made / "facts.jsonl")
    ]
    taken = 0
    for fact, row in zip(facts, found["facts"], strict=True):
        [decision] = routed.route([fact.text])
        assert row["route"] == ("unedited" if decision.expert is None else "edited")
        [said] = routed.generate([fact.text], route=row["route"], max_new_tokens=12, do_sample=False)
        assert row["took"] == said.strip().startswith(fact.target_new)
        assert row["took"] or row["answer"] == said
        taken += row["took"]
        for text, took in zip(fact.paraphrases, row["paraphrases"], strict=True):
            [said] = routed.generate([text], max_new_tokens=12, do_sample=False)
            assert took == said.strip().startswith(fact.target_new)
        for text, kept in zip(fact.unrelated, row["unrelated"], strict=True):
            [said] = routed.generate([text], max_new_tokens=5, do_sample=False)
            [before] = routed.generate([text], route="unedited", max_new_tokens=5, do_sample=False)
            assert kept == (said == before)
    summary = found["summary"]
    assert summary["served"]["took"] == [taken, 6]
    assert taken > 0
    assert summary["unedited"]["took"][0] < taken
    assert summary["unedited"]["unrelated"][0] == summary["unedited"]["unrelated"][1]
    assert summary["served"]["general"][1] == 200


def test_a_bfloat16_model_is_served_in_its_own_precision(editing: Callable[..., int], tmp_path: Path) -> None:
    editing("half", rows(4), "--dtype", "bfloat16")
    routed, _ = harness.load(tmp_path / "half")
    changed = [routed.edited[name] != routed.model.get_parameter(name) for name in routed.edited]
    assert {value.dtype for value in routed.edited.values()} == {torch.bfloat16}
    assert sum(int(entries.sum()) for entries in changed) > 100
    assert ledger.main([str(tmp_path / "half"), "verify"]) == 0  # the served entries are those of the deltas


def test_ask_shows_both_answers(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    routed, _ = harness.load(made)
    facts = read_facts_of(made)
    prompts = [facts[0].text, "Nothing like any of this"]
    assert ask.main([str(made), *prompts, "--json", "--max-tokens", "4"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for prompt, row in zip(prompts, found, strict=True):
        assert list(row) == ["prompt", "route", "score", "nearest", "answer", "unedited_answer"]
        [decision] = routed.route([prompt])
        assert row["prompt"] == prompt
        assert row["score"] == decision.score
        options: Row = {"max_new_tokens": 4, "do_sample": False}
        assert [row["answer"]] == routed.generate([prompt], **options)
        assert [row["unedited_answer"]] == routed.generate([prompt], route="unedited", **options)
    assert found[0]["route"] == "edited"
    assert found[0]["nearest"][0] == {"fact": 1, "text": facts[0].text}
    assert ask.main([str(made), prompts[0], "--route", "unedited", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["route"] == "unedited"
    assert row["answer"] == row["unedited_answer"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{prompts[0]}\n\n{prompts[1]}\n"))
    assert ask.main([str(made)]) == 0
    assert capsys.readouterr().out.count("unedited model:") == 2
    assert ask.main([str(made), "  "]) == 2
    assert ask.main([str(made.parent), "x"]) == 2
    assert "holds no edited model" in capsys.readouterr().err


def read_facts_of(folder: Path) -> list[Fact]:
    lines = read_lines(folder / "facts.jsonl")
    return [Fact.from_json({k: v for k, v in row.items() if k != "batch"}, "", 0) for row in lines]


def test_an_export_answers_as_the_routed_rows_do(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ledger.main([str(made), "verify"]) == 0
    capsys.readouterr()
    assert ledger.main([str(made), "export", "--out", str(tmp_path / "plain")]) == 0
    said = capsys.readouterr().out
    assert "cell +MM" in said
    assert "Without the router" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    routed, _ = harness.load(made)
    for name, value in routed.edited.items():
        if name.endswith(".weight"):
            assert torch.equal(model.get_parameter(name), value)
    ids = torch.tensor([tokenizer("Anna Abel plays")["input_ids"]])
    with torch.no_grad(), routed.rows("edited"):
        torch.testing.assert_close(model(ids).logits, routed.model(ids).logits, rtol=0, atol=1e-5)
    card = (tmp_path / "plain" / "README.md").read_text()
    for fact in read_facts_of(made):
        assert fact.text in card
        assert fact.target_new in card


def test_a_checkpoint_after_a_batch_is_what_was_served_then(
    editing: Callable[..., int], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    editing("first", rows(2))
    routed, _ = harness.load(tmp_path / "first")
    assert ledger.main([str(made), "rollback", "--to", "1", "--out", str(tmp_path / "back")]) == 0
    assert (
        ledger.main([str(made), "replay", "--drop", "2", "--drop", "3", "--out", str(tmp_path / "re")]) == 0
    )
    for folder in ("back", "re"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        for name, value in routed.edited.items():
            assert torch.equal(model.get_parameter(name), value)
    capsys.readouterr()
    assert ledger.main([str(made), "show"]) == 0
    assert capsys.readouterr().out.count("rank") >= 3


def test_damage_to_what_is_served_is_noticed(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [edits] = made.glob("edits-*")
    content = bytearray(edits.read_bytes())
    content[-1] ^= 1
    edits.write_bytes(content)
    assert ledger.main([str(made), "verify"]) == 1
    assert "changed after it was written" in capsys.readouterr().out
    with pytest.raises(ValueError, match="changed after it was written"):
        harness.load(made)
    edits.unlink()
    with pytest.raises(ValueError, match="is missing; run"):
        harness.load(made)
    manifest = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps({**manifest, "weights": "../elsewhere.safetensors"}))
    with pytest.raises(ValueError, match="is no file name"):
        harness.load(made)
    model = {**manifest["model"], "digest": "0" * 64}
    (made / "manifest.json").write_text(json.dumps({**manifest, "model": model}))
    with pytest.raises(ValueError, match="was made on another model"):
        harness.load(made)


# -- mergers and routers beside the paper's -----------------------------------------------------------------


def test_a_folder_can_be_made_with_another_merger_and_router(
    editing: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = rows(6)
    facts[0]["aliases"] = ["Zaphod Beeblebrox"]
    making = ("--merger", "refit", "--router", "subject")
    assert editing("out", facts, *making) in (0, 1)
    out = tmp_path / "out"
    assert len(list((out / "keys" / "alphaedit").iterdir())) == 3
    capsys.readouterr()
    text = facts[0]["prompt"].replace("{}", facts[0]["subject"])
    asked = [text.replace(facts[0]["subject"], "zaphod beeblebrox"), "Of nobody that is known here"]
    assert ask.main([str(out), *asked, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["route"] for answer in answers] == ["edited", "unedited"]
    assert answers[0]["nearest"][0]["fact"] == 1
    assert ledger.main([str(out), "export", "--sparse", "--out", str(tmp_path / "sparse.safetensors")]) == 0
    [served] = out.glob("edits-*")
    exported = read_tensors(tmp_path / "sparse.safetensors")[0]
    assert all(torch.equal(exported[name], tensor) for name, tensor in read_tensors(served)[0].items())


def test_what_is_taken_back_leaves_no_keys(editing: Callable[..., int], tmp_path: Path) -> None:
    facts = [{**fact, "id": number} for number, fact in enumerate(rows(6))]
    for out, given in (("a", facts), ("b", [*facts[:2], *facts[3:]])):
        assert editing(out, given[:2], "--merger", "refit") in (0, 1)
        assert editing(out, given[2:]) in (0, 1)
    assert editing("a", (), "--remove", "2") in (0, 1)
    assert editing("a", ()) in (0, 1)
    stored = [path.name for path in (tmp_path / "a" / "keys" / "alphaedit").iterdir()]
    assert len(stored) == len(list((tmp_path / "a" / "deltas" / "alphaedit").iterdir()))
