"""What a user can get wrong: one line that names the value, what is known and the remedy; exit status 2.

The table below is shown in ``docs/inputs.md``, with the lines as they read.
"""

import copy
import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import harness.run
from benchmarks.tiny import tiny_knowedit_records, tiny_records, tiny_texts
from harness import ablation
from harness.paths import read_lines, shown

LAYERS = ["memit.layers=1,2", "alphaedit.layers=1,2"]
DOCS = Path(__file__).parents[2] / "docs" / "inputs.md"
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bad:
    """Flags that replace the right ones (None: left out), and what is said; {name} stands for a file."""

    flags: dict[str, list[str] | None]
    says: tuple[str, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


# -- the table ----------------------------------------------------------------------------------------------


def lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def counterfact() -> list[Record]:
    records = tiny_records(6)
    for number, record in enumerate(records):
        record["requested_rewrite"]["target_new"]["id"] = f"Q{number}"
    return records


def changed(record: Record, place: str, value: Any) -> None:
    """Set a field, named by dots; ``...`` takes it out."""
    *parents, last = place.split(".")
    for name in parents:
        record = record[name]
    if value is ...:
        del record[last]
    else:
        record[last] = value


def dataset(content: bytes, *says: str, name: str = "mine.jsonl") -> Bad:
    return Bad(flags={"dataset": [f"{{{name}}}"]}, files={name: content}, says=(name, *says))


def fact(place: str, value: Any, *says: str) -> Bad:
    """The third record in CounterFact's schema with one field changed."""
    records = counterfact()
    changed(records[2], place, value)
    return dataset(lines(records), *says)


def knowedit(place: str, value: Any, *says: str) -> Bad:
    """The third record in KnowEdit's schema with one field changed."""
    records = tiny_knowedit_records(6)
    changed(records[2], place, value)
    return dataset(lines(records), *says)


def misspelt(right: str, wrong: str, records: list[Record]) -> Bad:
    records = copy.deepcopy(records)
    records[2][wrong] = records[2].pop(right)
    return dataset(lines(records), "case 2", f"unknown field '{wrong}'", f"'{right}' is missing")


def flag(name: str, *values: str, says: tuple[str, ...]) -> Bad:
    return Bad(flags={name: list(values)}, says=says)


def with_set(value: str, *says: str) -> Bad:
    return flag("set", *LAYERS, value, says=says)


def stats(content: bytes, *says: str, name: str = "corpus.jsonl") -> Bad:
    return Bad(flags={"stats": [f"{{{name}}}"]}, files={name: content}, says=(name, *says))


def references(content: bytes, *says: str) -> Bad:
    flags = {"generation": [], "references": ["{snippets.json}"]}
    return Bad(flags=flags, files={"snippets.json": content}, says=says)


def snippet(**changes: Any) -> bytes:
    return lines([{"relation_id": "P1", "target_id": "Q0", "samples": [{"text": "some words"}]} | changes])


def config(text: str | bytes, *says: str, path: bool = True, without: str = "", **files: bytes) -> Bad:
    content = text if isinstance(text, bytes) else text.encode()
    return Bad(
        flags={"config": ["{run.yaml}"]} | ({without: None} if without else {}),
        files={"run.yaml": content} | files,
        says=(*(["run.yaml"] if path else []), *says),
    )


def settings(text: str | bytes, *says: str) -> Bad:
    content = text if isinstance(text, bytes) else text.encode()
    return Bad(
        flags={"hyperparameters": ["{tuned.yaml}"]}, files={"tuned.yaml": content}, says=("tuned.yaml", *says)
    )


GOOD = lines(counterfact())
PACKED = gzip.compress(GOOD, mtime=0)
KNOWEDIT = tiny_knowedit_records(6)
NO_ID = [{name: value for name, value in record.items() if name != "case_id"} for record in counterfact()]

TABLE: dict[str, dict[str, Bad]] = {
    "A record in CounterFact's schema": {
        "prompt without a place": fact("requested_rewrite.prompt", "She was born in", "case 2", "0 places"),
        "prompt with two places": fact("requested_rewrite.prompt", "{} and {} are", "case 2", "2 places"),
        "empty prompt": fact("requested_rewrite.prompt", "", "case 2", "requested_rewrite.prompt: ''"),
        "blank prompt": fact("requested_rewrite.prompt", " \t", "case 2", "requested_rewrite.prompt: ' \\t'"),
        "prompt missing": fact("requested_rewrite.prompt", ..., "case 2", "field 'prompt' is missing"),
        "empty subject": fact("requested_rewrite.subject", "", "case 2", "requested_rewrite.subject: ''"),
        "blank subject": fact("requested_rewrite.subject", "  ", "case 2", "requested_rewrite.subject: '  '"),
        "subject is a number": fact("requested_rewrite.subject", 7, "case 2", "'subject' is 7, not a str"),
        "subject with a place in it": fact(
            "requested_rewrite.subject", "A {} b", "case 2", "has {}, which marks"
        ),
        "null character in the subject": fact(
            "requested_rewrite.subject", "A\0b", "case 2", "null character"
        ),
        "null character in a prompt": fact(
            "neighborhood_prompts", ["a\0"], "neighborhood_prompts[0]", "null"
        ),
        "empty target": fact("requested_rewrite.target_new.str", "", "case 2", "target_new.str: ''"),
        "blank target": fact("requested_rewrite.target_new.str", "\n", "case 2", "target_new.str: '\\n'"),
        "target is null": fact("requested_rewrite.target_new", None, "case 2", "'target_new' is None"),
        "target is a text": fact(
            "requested_rewrite.target_new", "Rome", "'target_new' is 'Rome', not a dict"
        ),
        "true target missing": fact("requested_rewrite.target_true", ..., "field 'target_true' is missing"),
        "blank true target": fact("requested_rewrite.target_true.str", " ", "case 2", "target_true.str: ' '"),
        "target equal to the truth": fact(
            "requested_rewrite.target_new",
            {"str": f" {counterfact()[2]['requested_rewrite']['target_true']['str']}"},
            "case 2: target_new equals target_true",
            "nothing to edit",
        ),
        "relation id is a list": fact("requested_rewrite.relation_id", ["P1"], "'relation_id' is ['P1']"),
        "target id is a number": fact("requested_rewrite.target_new.id", 3, "target_new", "'id' is 3"),
        "relation is a number": fact("relation", 5, "case 2", "'relation' is 5, not a str"),
        "conflict mark is a text": fact(
            "no_subject_relation_conflict", "false", "'no_subject_relation_conflict' is 'false', not a bool"
        ),
        "requested_rewrite missing": fact("requested_rewrite", ..., "'requested_rewrite' is missing"),
        "requested_rewrite is a list": fact("requested_rewrite", [1], "'requested_rewrite' is [1]"),
        "no paraphrases": fact(
            "paraphrase_prompts", [], "case 2", "'paraphrase_prompts' is []", "at least 1"
        ),
        "paraphrase with the place left in": fact(
            "paraphrase_prompts", ["Later, {} was born in"], "paraphrase_prompts[0]", "still has {}"
        ),
        "neighbours are a text": fact("neighborhood_prompts", "a text", "'neighborhood_prompts' is 'a text'"),
        "neighbour is null": fact("neighborhood_prompts", ["fine", None], "neighborhood_prompts[1]: None"),
        "generation prompt is a number": fact("generation_prompts", [3], "generation_prompts[0]: 3"),
        "misspelt generation_prompts": misspelt("generation_prompts", "generation_prompt", counterfact()),
        "misspelt neighborhood_prompts": misspelt(
            "neighborhood_prompts", "neighbourhood_prompts", counterfact()
        ),
        "case id is null": fact("case_id", None, "record 3: case_id None"),
        "case id is a fraction": fact("case_id", 1.5, "record 3: case_id 1.5"),
        "case id is empty": fact("case_id", "", "record 3: case_id ''"),
        "case id with a line break": fact("case_id", "a\nb", "record 3: case_id 'a\\nb'"),
        "case id twice": fact("case_id", 1, "case_id 1 occurs more than once"),
        "only contradictions": dataset(
            lines([*NO_ID[:1], *NO_ID[:1]]), "all 2 records contradict", "leave one"
        ),
        "neither schema": dataset(
            lines([{"question": "?", "answer": "!"}]), "'question'", "requested_rewrite"
        ),
    },
    "A record in KnowEdit's schema": {
        "subject missing (KnowEdit)": knowedit("subject", ..., "case 2", "field 'subject' is missing"),
        "blank subject (KnowEdit)": knowedit("subject", " ", "case 2, subject: ' '"),
        "subject in no prompt": dataset(
            lines([{**record, "subject": "Somebody Else"} for record in KNOWEDIT]),
            "in all 6 records the subject is not in the prompt",
        ),
        "prompt with a place of its own": knowedit(
            "prompt", f"{{}} or {KNOWEDIT[2]['subject']}?", "case 2", "2 places"
        ),
        "blank target (KnowEdit)": knowedit("target_new", " ", "case 2, target_new: ' '"),
        "target is a list": knowedit("target_new", ["a"], "field 'target_new' is ['a'], not a str"),
        "no true answer": knowedit("ground_truth", [], "'ground_truth' is []", "needs an answer"),
        "true answer is a number": knowedit("ground_truth", ["a", 3], "case 2, ground_truth: 3"),
        "rephrased prompt is a list": knowedit("rephrase_prompt", ["a"], "rephrase_prompt: ['a']"),
        "locality is false": knowedit("locality", False, "field 'locality' is False, not a dict"),
        "portability is a list": knowedit("portability", [], "field 'portability' is [], not a dict"),
        "portability without a prompt": knowedit(
            "portability", {"Reasoning": [{"ground_truth": "a"}]}, "portability.Reasoning[0]", "'prompt'"
        ),
        "null character in an answer": knowedit(
            "locality", {"Relation_Specificity": [{"prompt": "p", "ground_truth": "a\0"}]}, "null character"
        ),
        "misspelt portability": misspelt("portability", "portabilty", KNOWEDIT),
    },
    "A file of records": {
        "broken JSON in a line": dataset(GOOD + b'{"case_id": 9,\n', "line 7: not JSON"),
        "two objects in a line": dataset(b"{} {}\n", "line 1: not JSON", "one object a line"),
        "unclosed list": dataset(b"[" + GOOD[:40], "is not JSON"),
        "a table of another program": dataset(b"subject,prompt\nAda,Ada is\n", "line 1: not JSON"),
        "list of texts": dataset(b'["a", "b"]', "record 1: 'a' is not an object"),
        "a number in a line": dataset(GOOD + b"3\n", "record 7: 3 is not an object"),
        "no number": dataset(b'{"case_id": NaN}\n', "line 1", "NaN is no JSON value"),
        "infinity": dataset(b'[{"case_id": -Infinity}]', "-Infinity is no JSON value"),
        "field twice in an object": dataset(b'{"a": 1, "a": 2}\n', "line 1", "'a' occurs twice"),
        "half of a surrogate pair": dataset(b'{"subject": "\\ud83d"}\n', "line 1", "surrogate pair"),
        "a number of 5,000 digits": dataset(
            b'{"case_id": ' + b"9" * 5000 + b"}\n", "line 1: broken", "5000 digits"
        ),
        "lists 100,000 deep": dataset(b'{"a": ' + b"[" * 100_000 + b"\n", "line 1: nested too deeply"),
        "truncated gzip": dataset(PACKED[:-20], "cannot be read", "fetch it again", name="mine.jsonl.gz"),
        "gzip with a wrong sum": dataset(
            PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "cannot be read", name="mine.jsonl.gz"
        ),
        "not packed, though named .gz": dataset(GOOD, "cannot be read", name="mine.jsonl.gz"),
        "packed, though not named .gz": dataset(PACKED, "is not UTF-8", "name it .gz"),
        "Latin-1": dataset('{"subject": "Zoë"}\n'.encode("latin-1"), "is not UTF-8", "line 1", "save it"),
        "UTF-16": dataset(GOOD.decode().encode("utf-16"), "is not UTF-8", "it is UTF-16"),
        "empty file": dataset(b"", "has no records"),
        "blank lines only": dataset(b"\n \n", "has no records"),
        "empty list": dataset(b"[]", "has no records"),
        "empty file, packed": dataset(gzip.compress(b""), "has no records", name="mine.jsonl.gz"),
        "a folder": flag("dataset", "{folder}", says=("it is a folder; give a file",)),
        "a device": flag("dataset", "/dev/zero", says=("'/dev/zero'", "no regular file")),
        "no such file": flag("dataset", "{folder}/none.jsonl", says=("unknown dataset", "known: facts")),
    },
    "Sizes": {
        "more edits than records": flag(
            "batch_size", "5", says=("10 edits asked", "6 usable", "--batch-size")
        ),
        "batch size 0": flag("batch_size", "0", says=("batch_size is 0", "at least 1")),
        "batch size negative": flag("batch_size", "-2", says=("batch_size is -2", "at least 1")),
        "no batches": flag("num_batches", "0", says=("num_batches is 0", "at least 1")),
        "token limit negative": flag("limit_stats", "-5", says=("limit_stats is -5", "at least 1")),
        "negatives negative": flag("negatives", "-1", says=("negatives is -1", "at least 1")),
        "top-k negative": flag("top_k", "-1", says=("top_k is -1", "at least 1")),
        "top-k twice": flag("top_k", "2", "2", says=("top_k is [2, 2]", "none twice")),
        "pruning ratio negative": flag("pruning_ratio", "-0.1", says=("pruning_ratio is -0.1",)),
        "pruning ratio no number": flag("pruning_ratio", "nan", says=("pruning_ratio is nan",)),
        "pruning ratio infinite": flag("pruning_ratio", "inf", says=("pruning_ratio is inf",)),
        "seed too large": flag("seed", str(2**63), says=("seed is 9223372036854775808", "2**63 - 1")),
        "no generation prompts": Bad(
            flags={"generation": [], "generation_prompts": ["0"]}, says=("generation_prompts is 0",)
        ),
        "batch size is a word": flag("batch_size", "all", says=("--batch-size", "'all'", "--help")),
        "batch size of 5,000 digits": flag("batch_size", "9" * 5000, says=("--batch-size", " ... ")),
    },
    "Fields of editors": {
        "layers beyond the model": with_set("memit.layers=1,5", "layers up to 5", "blocks 0 to 4"),
        "negative layer": with_set("memit.layers=-1", "memit", "not negative"),
        "layer twice": with_set("memit.layers=2,2", "memit", "ascending"),
        "no layers": with_set("alphaedit.layers=", "alphaedit", "layers is empty"),
        "steps negative": with_set("memit.steps=-1", "memit: steps is -1"),
        "rate is no number": with_set("memit.learning_rate=nan", "'nan' is not a float", "finite"),
        "rate is infinite": with_set("memit.learning_rate=inf", "'inf' is not a float", "finite"),
        "rate below everything": with_set("memit.learning_rate=-inf", "'-inf' is not a float", "finite"),
        "rate too large for a float": with_set("memit.learning_rate=1e999", "'1e999'", "finite"),
        "rate zero": with_set("alphaedit.learning_rate=0", "alphaedit: learning_rate is 0.0"),
        "no value": with_set("memit.steps", "EDITOR.FIELD=VALUE"),
        "nothing after --set": flag("set", says=("--set", "--help")),
        "unknown field": with_set("memit.step=3", "unknown field 'step' of memit", "known: layers"),
    },
    "Names": {
        "editor in capitals": flag("editors", "MEMIT", says=("unknown editor 'MEMIT'", "known: ft")),
        "cell in small letters": flag("cells", "+mm", says=("unknown cell '+mm'", "known: baseline")),
        "dataset with a blank": flag("dataset", "facts ", says=("unknown dataset 'facts '", "known: facts")),
        "merger of another name": flag(
            "merger", "slerp", says=("unknown merger 'slerp'", "known: self-aware")
        ),
        "router of another name": flag("router", "knn", says=("unknown router 'knn'", "known: topk")),
        "dtype abbreviated": flag("dtype", "fp16", says=("unknown dtype 'fp16'", "known: float32")),
        "encoder without a model": flag("encoder", "openai:", says=("'openai:' names no model", "minilm")),
        "device that torch would take for 44": flag("device", "cuda:300", says=("'cuda:300' is not there",)),
        "device that torch would take for -128": flag(
            "device", "cuda:128", says=("'cuda:128' is not there",)
        ),
        "second processor": flag("device", "cpu:1", says=("unknown device 'cpu:1'", "known: cpu")),
        "task of another name": flag("capability", "seqmmr_mrcp", says=("unknown task", "known: ")),
        "empty model": flag("model", "", says=("--model is ''", "leave it out")),
        "empty dataset": flag("dataset", "", says=("--dataset is ''", "leave it out")),
        "blank editor": flag("editors", "memit", " ", says=("--editors is ' '", "leave it out")),
        "empty data folder": flag("data", "", says=("--data is ''", "leave it out")),
        "null byte": flag("dataset", "a\0.jsonl", says=("--dataset is 'a\\x00.jsonl'", "control characters")),
        "line break": flag("encoder", "mini\nlm", says=("--encoder is 'mini\\nlm'", "control characters")),
        "name of 300 letters": flag("dataset", "a" * 300, says=("--dataset", "300 characters", "shorter")),
        "name of 100,000 letters": flag("model", "a/" * 50_000, says=("--model", "100000 characters")),
        "name that is not UTF-8": flag("stats", "a\udcff", says=("--stats", "not UTF-8", "rename it")),
        "unknown flag with a line break": flag("nothing\nat", "1", says=("--nothing at", "--help")),
        "data folder that is not there": flag("data", "{folder}/none", says=("does not exist", "--data")),
        "data folder without the data": Bad(
            flags={"dataset": ["counterfact"], "data": ["{folder}"]}, says=("has none of multi_counterfact",)
        ),
    },
    "The statistics corpus": {
        "empty corpus": stats(b"", "has no records"),
        "corpus without text": stats(lines([{"title": "a"}]), "record 1", "'text' is missing or empty"),
        "corpus with a blank text": stats(lines([{"text": "a"}, {"text": " "}]), "record 2", "'text'"),
        "corpus with a number": stats(lines([{"text": 3}]), "record 1", "'text'"),
        "corpus is a folder": flag("stats", "{folder}", says=("it is a folder",)),
        "corpus cut off": stats(PACKED[:-9], "cannot be read", name="corpus.jsonl.gz"),
    },
    "Reference texts": {
        "references without texts": flag("references", "{good.jsonl}", says=("no texts", "--generation")),
        "references missing": Bad(
            flags={"generation": [], "references": ["{folder}/none"]}, says=("cannot be read", "not exist")
        ),
        "references of something else": references(lines([{"a": 1}]), "snippets.json', record 1", "needs"),
        "references of other records": references(
            snippet(relation_id="P99"), "no text for any", "leave them"
        ),
        "reference text is a number": references(snippet(samples=[{"text": 3}]), "record 1: 3 is not a text"),
        "reference's relation is a list": references(snippet(relation_id=[1]), "record 1: [1] is not a text"),
        "references without words": references(
            lines(
                [
                    {
                        "relation_id": record["requested_rewrite"]["relation_id"],
                        "target_id": record["requested_rewrite"]["target_new"]["id"],
                        "samples": [{"text": "? !"}],
                    }
                    for record in counterfact()
                ]
            ),
            "no words",
        ),
    },
    "The config file": {
        "config with unknown names": config("modell: gpt2\n", "unknown name 'modell'", "known: model"),
        "config with a number for a name": config("1: 2\n", "unknown name 1", "known: model"),
        "name twice": config("seed: 1\nseed: 2\n", "'seed' occurs twice"),
        "name twice, spelled in two ways": config("top-k: 1\ntop_k: 2\n", "top_k is given twice"),
        "word for a number": config("seed: many\n", "seed is 'many'", "takes int"),
        "date for a number": config("seed: 2020-01-01\n", "seed is datetime.date(2020, 1, 1)", "takes int"),
        "date that is none": config("seed: 2020-13-41\n", "cannot be read", "correct the YAML"),
        "tag that does not fit": config("seed: !!timestamp x\n", "cannot be read", "correct the YAML"),
        "tag that makes objects": config("seed: !!python/object:os.system {}\n", "cannot be read", "tag"),
        "word for yes or no": config("generation: 1\n", "generation is 1", "true or false"),
        "number of 4,000 bits": config(
            f"seed: 0x{'f' * 1000}0\n", "seed is a number of 4004 bits", path=False
        ),
        "list in a list": config("editors: [[memit]]\n", "editors is [['memit']]", "takes str"),
        "list that contains itself": config("editors: &a [*a]\n", "editors is [[[[[...]]]]]", "takes str"),
        "empty name in the config": config("dataset: ''\n", "dataset is ''", "leave it out"),
        "config is a folder": flag("config", "{folder}", says=("it is a folder",)),
        "config is empty": config("", "no mapping", "known: model"),
        "config in Latin-1": config("model: Zoë\n".encode("latin-1"), "not UTF-8", "save it as UTF-8"),
        "no runs": config("runs: {}\n", "runs is {}", "mapping of names"),
        "run above the folder": config("runs: {..: {seed: 1}}\n", "named '..'", "name of a folder"),
        "run in another folder": config("runs: {a/b: {seed: 1}}\n", "named 'a/b'", "name of a folder"),
        "run with a null byte": config('runs: {"a\\0": {seed: 1}}\n', "a\\x00", "control characters"),
        "run with a number for a name": config("runs: {1: {seed: 1}}\n", "named 1", "name of a folder"),
        "run of another form": config("runs: {a: 3}\n", "runs is {'a': 3}", "mapping of names"),
        "second run with an unknown name": config(
            "runs: {a: {seed: 1}, b: {chain: both}}\n", "run 'b'", "unknown chain 'both'", "known: shadow"
        ),
        "second run with too many edits": config(
            "runs: {a: {batch_size: 2}, b: {batch_size: 9}}\n",
            "run 'b'",
            "18 edits asked",
            "6 usable",
            without="batch_size",
        ),
        "second run with a broken dataset": config(
            "runs: {a: {dataset: good.jsonl}, b: {dataset: mine.jsonl}}\n",
            "run 'b'",
            "mine.jsonl', line 1: not JSON",
            without="dataset",
            **{"mine.jsonl": b"{"},
        ),
        "run with references in vain": config(
            "runs: {a: {seed: 1}, b: {references: r.json}}\n", "run 'b'", "--generation"
        ),
    },
    "The hyperparameter file": {
        "settings missing": flag("hyperparameters", "{folder}/none", says=("cannot be read", "not exist")),
        "settings are a list": settings("- memit\n", "no mapping", "known: ft"),
        "settings of an unknown editor": settings("memmit: {layers: [1]}\n", "unknown editor 'memmit'"),
        "settings with an unknown field": settings("memit: {layer: [1]}\n", "unknown field 'layer' of memit"),
        "settings without a value": settings("memit: 3\n", "memit is 3", "mapping of fields"),
        "layers as words": settings("memit: {layers: [one]}\n", "memit.layers is ['one']", "whole numbers"),
        "steps as a fraction": settings("memit: {layers: [1], steps: 2.5}\n", "'2.5' is not a int"),
        "rate that is no number": settings("memit: {layers: [1], learning_rate: .nan}\n", "'nan'", "finite"),
        "yes for a number": settings("memit: {layers: [1], steps: true}\n", "memit.steps is True", "takes a"),
        "layer of 4,000 bits": settings(f"memit: {{layers: [0x{'f' * 1000}]}}\n", "below 2**63"),
        "editor twice": settings("memit: {layers: [1]}\nmemit: {layers: [2]}\n", "'memit' occurs twice"),
        "tuning of another form": settings("tuning: [1]\n", "tuning is [1]", "takes a mapping"),
    },
    "The output folder": {
        "output is a file": flag("out", "{good.jsonl}", says=("is a file", "another --out")),
        "output below a file": flag("out", "{good.jsonl}/run", says=("cannot be written", "another --out")),
        "output cannot be made": flag("out", "/proc/none/run", says=("cannot be written", "another --out")),
        "output of another run": flag(
            "out", "{other}", says=("run of another spec", "batch_size", "--fresh")
        ),
        "output holds no run": flag(
            "out", "{notes}", says=("is not empty and holds no run", "another --out")
        ),
        "empty output": flag("out", "", says=("--out is ''", "leave it out")),
        "output with a null byte": flag("out", "{folder}/a\0", says=("--out", "control characters")),
        "output with a long name": flag("out", "a" * 256, says=("--out", "256 characters", "shorter")),
        "cache is a file": Bad(
            flags={}, environment={"SEQMMR_CACHE": "{good.jsonl}"}, says=("cannot be made", "SEQMMR_CACHE")
        ),
    },
}
ROWS = {name: bad for rows in TABLE.values() for name, bad in rows.items()}


# -- the tests ----------------------------------------------------------------------------------------------


def call(*arguments: str) -> int:
    """The exit status, however the command ends."""
    try:
        return ablation.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(harness.run, "load_model", refuse)


@pytest.fixture
def refused(
    tmp_path: Path, tiny_folder: Path, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Bad], int]:
    """Writes what a row needs, and calls the command with it; the exit status."""
    right = {
        "good.jsonl": GOOD,
        "texts.jsonl": lines([{"text": text} for text in tiny_texts(20)]),
        "notes/mine.txt": b"precious",
        "other/run.json": b'{"spec": {"model": "another"}}',
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()

    def run(bad: Bad) -> int:
        for name, content in (right | bad.files).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        places = {entry.name: str(entry) for entry in tmp_path.iterdir()}

        def filled(text: str) -> str:
            for name, place in places.items():
                text = text.replace(f"{{{name}}}", place)
            return text

        for name, value in bad.environment.items():
            monkeypatch.setenv(name, filled(value))
        flags = {
            "model": [str(tiny_folder)], "dataset": ["{good.jsonl}"], "stats": ["{texts.jsonl}"],
            "set": LAYERS, "batch_size": ["2"], "num_batches": ["2"], "device": ["cpu"], "out": ["run"],
        } | bad.flags  # fmt: skip
        arguments = [
            part
            for name, values in flags.items()
            if values is not None
            for part in (f"--{name.replace('_', '-')}", *values)
        ]
        return call(*map(filled, arguments))

    return run


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_input_is_one_line_before_a_model_is_loaded(
    refused: Callable[[Bad], int], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    bad = ROWS[name]
    assert refused(bad) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert output.err.endswith("\n")
    assert len(output.err) < 2200  # even where what was given is longer
    assert all(text in output.err for text in bad.says), output.err
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "notes" / "mine.txt").read_text() == "precious"
    assert (tmp_path / "good.jsonl").read_bytes() == GOOD


def test_right_inputs_get_as_far_as_the_model(refused: Callable[[Bad], int]) -> None:
    with pytest.raises(AssertionError, match="a model was loaded"):
        refused(Bad(flags={}, says=()))


def test_the_docs_show_the_table() -> None:
    rows = [line.split(" | ") for line in DOCS.read_text("utf-8").splitlines() if line.startswith("| ")]
    shown_there = {cells[0].removeprefix("| "): cells[-1] for cells in rows}
    assert len(ROWS) == sum(map(len, TABLE.values())) >= 60
    for name, bad in ROWS.items():
        missing = [text for text in bad.says if text not in shown_there.get(name, "").replace("\\|", "|")]
        assert not missing, f"docs/inputs.md, {name}: {missing}"


# -- what is read all the same ------------------------------------------------------------------------------


def test_a_mark_at_the_beginning_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "marked.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert read_lines(path) == counterfact()


def test_pairs_of_surrogates_are_characters(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00 \\u00e9"}\n')
    assert read_lines(path) == [{"a": "😀 é"}]


def test_values_in_messages_end() -> None:
    deep: list[Any] = []
    for _ in range(sys.getrecursionlimit() * 2):
        deep = [deep]
    for value in (deep, "a" * 10**6, [["b" * 10**5] * 1000] * 1000, 10**10_000, {"c" * 10**6: "d"}):
        assert len(shown(value)) <= 400
        assert "\n" not in shown(value)
    assert shown("it's 'a' \n") == repr("it's 'a' \n")
