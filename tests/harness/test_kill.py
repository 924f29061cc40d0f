"""Runs that are killed, or refused a write: the same command again ends with the same bytes.

Three points are tried with the tests; ``nox -s soak`` (SEQMMR_SOAK) tries every write of a run, and every
stage between writes. The processes are those of ``kill_driver.py``.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny import tiny_model, tiny_records, tiny_texts, tiny_tokenizer

ROOT = Path(__file__).parents[2]
soak = pytest.mark.skipif(not os.environ.get("SEQMMR_SOAK"), reason="takes long: nox -s soak")

SPECS = {
    "shadow": ["alphaedit", "rect", "ft"],
    "merged": ["memit-seq", "--chain", "merged", "--cells", "+MM", "+MM+R"],
}
SETTINGS = [
    *(
        f"{editor}.{setting}"
        for editor in ("alphaedit", "rect", "memit-seq")
        for setting in ("layers=1,2", "steps=3", "clamp_norm_factor=4")
    ),
    "alphaedit.nullspace_threshold=1", "ft.layers=1", "ft.steps=3",
]  # fmt: skip
UNTIMED = ("run_id", "schema_version", "spec", "stages", "provenance", "status", "notes")  # of run.json
Fault = tuple[str, int]  # as kill_driver.py takes it


@dataclass
class Outcome:
    """How a process ended, and what it did until then."""

    status: int
    stderr: str
    events: list[list[str]]

    def number(self, kind: str) -> int:
        return sum(event[0] == kind for event in self.events)


class Driver:
    """The process that starts all others, and the model and data they use."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.numbers = folder, count()
        tiny_model("gpt2", blocks=3).save_pretrained(folder / "tiny")
        tiny_tokenizer(bos=True).save_pretrained(folder / "tiny")
        few = ("paraphrase_prompts", "neighborhood_prompts")
        records = [record | {name: record[name][:1] for name in few} for record in tiny_records(12)]
        texts = [{"text": text} for text in tiny_texts(20)]
        for name, rows in (("records.jsonl", records), ("texts.jsonl", texts)):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "kill_driver.py", folder / "tiny"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env,
        )  # fmt: skip

    def run(self, home: "Home", *more: str, fault: Fault | None = None, forwards: bool = False) -> Outcome:
        """The command in a process of its own, with the home's folder and caches."""
        assert self.process.stdin is not None and self.process.stdout is not None
        argv = [
            "--model", str(self.folder / "tiny"), "--dataset", str(self.folder / "records.jsonl"),
            "--stats", str(self.folder / "texts.jsonl"), "--device", "cpu", "--batch-size", "2",
            "--num-batches", "3", "--out", str(home.run), "--editors", *SPECS[home.spec],
            "--set", *(s for s in SETTINGS if s.split(".")[0] in SPECS[home.spec]), *more,
        ]  # fmt: skip
        request = {"argv": argv, "cache": str(home.cache), "fault": fault, "forwards": forwards}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        outcome = Outcome(**json.loads(self.process.stdout.readline()))
        home.take(outcome)
        return outcome

    def home(self, spec: str) -> "Home":
        return Home(spec, self.folder / str(next(self.numbers)))


@dataclass
class Home:
    """A run's folder and caches, and what processes say they wrote into them."""

    spec: str
    folder: Path
    said: dict[str, str] = field(default_factory=dict)  # path -> digest

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def take(self, outcome: Outcome) -> None:
        for kind, path, *more in outcome.events:
            if kind == "write":
                self.said[path] = more[0]
            elif kind == "remove":
                self.said.pop(path, None)

    def check(self) -> None:
        """Every file is as it was last written, whole; none is there that was never finished."""
        there = {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.folder.rglob("*") if path.is_file() and not path.name.startswith(".")
        }  # fmt: skip
        assert there == self.said

    def unfinished(self, folder: Path) -> list[str]:
        hidden = [path for path in folder.rglob(".*") if path.name != ".lock"]
        return [str(path.relative_to(folder)) for path in hidden]

    def contents(self) -> dict[str, Any]:
        """All results, which do not depend on when and in how many goes they were made."""
        found: dict[str, Any] = {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file() and not path.name.startswith(".") and self.run / "state" not in path.parents
        }  # fmt: skip
        info = json.loads(found["run/run.json"])
        lines = found["run/records.jsonl"].decode().splitlines()
        return found | {
            "run/run.json": {name: info[name] for name in UNTIMED},
            "run/records.jsonl": [json.loads(line) | {"seconds": 0} for line in lines],
        }


@dataclass
class Undisturbed:
    home: Home
    outcome: Outcome
    contents: dict[str, Any]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    driver = Driver(tmp_path_factory.mktemp("kill"))
    yield driver
    assert driver.process.stdin is not None
    driver.process.stdin.close()
    assert driver.process.wait(60) == 0


@pytest.fixture(scope="module")
def undisturbed(driver: Driver) -> dict[str, Undisturbed]:
    """By spec: a run that nothing happened to."""
    found = {}
    for spec in SPECS:
        home = driver.home(spec)
        outcome = driver.run(home, forwards=True)
        assert outcome.status == 0, outcome.stderr
        home.check()
        found[spec] = Undisturbed(home, outcome, home.contents())
    return found


def assert_resumed(driver: Driver, home: Home, wanted: Undisturbed, *more: str) -> None:
    """The same command again ends as if nothing had happened."""
    outcome = driver.run(home, *more)
    assert outcome.status == 0, outcome.stderr
    home.check()
    assert not home.unfinished(home.run)
    found = home.contents()
    assert found.keys() == wanted.contents.keys()
    assert [name for name in found if found[name] != wanted.contents[name]] == []


def assert_survives_death(driver: Driver, wanted: Undisturbed, fault: Fault) -> None:
    home = driver.home(wanted.home.spec)
    outcome = driver.run(home, fault=fault)
    assert outcome.status == -9, outcome.stderr
    home.check()
    assert_resumed(driver, home, wanted)
    shutil.rmtree(home.folder)


def assert_stops_at_failure(driver: Driver, wanted: Undisturbed, fault: Fault) -> None:
    home = driver.home(wanted.home.spec)
    outcome = driver.run(home, fault=fault)
    lines = outcome.stderr.splitlines()
    assert outcome.status in (1, 2), outcome.stderr
    assert [line for line in lines if line.startswith("harness.ablation: ")] == lines[-1:], outcome.stderr
    reason = {"full": "File too large", "eio": "Input/output error"}.get(fault[0], "No space left on device")
    assert reason in lines[-1]
    assert not any("Traceback" in line or "failed" in line for line in lines), outcome.stderr
    home.check()
    assert not home.unfinished(home.folder)
    assert_resumed(driver, home, wanted)
    shutil.rmtree(home.folder)


def stages(wanted: Undisturbed) -> dict[str, int]:
    """What was going on -> the number of the forward in its middle."""
    doing: dict[str, list[int]] = {}
    forwards = [event[1] for event in wanted.outcome.events if event[0] == "forward"]
    for number, label in enumerate(forwards, start=1):
        doing.setdefault(label, []).append(number)
    return {label: numbers[len(numbers) // 2] for label, numbers in doing.items()}


# -- with the tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label", ["statistics", "edit with alphaedit, batch 2 of 3, 2 of 6 edits done, updates", "score rect+MM"]
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    driver: Driver, undisturbed: dict[str, Undisturbed], label: str
) -> None:
    wanted = undisturbed["shadow"]
    assert_survives_death(driver, wanted, ("forward", stages(wanted)[label]))


# -- in soak ------------------------------------------------------------------------------------------------

KILLS = {"before": "write", "half": "write", "after": "write", "unremoved": "remove", "removed": "remove"}
FAILURES = {"full": "write", "enospc": "write", "eio": "write", "nodir": "mkdir"}


def tried(check: Any, driver: Driver, wanted: Undisturbed, faults: Sequence[Fault]) -> None:
    """Check every fault, and tell of all that failed."""
    assert faults
    failed = []
    for fault in faults:
        try:
            check(driver, wanted, fault)
        except AssertionError as error:
            failed.append(f"{fault}: {error}")
    assert not failed, "\n\n".join(failed)


@soak
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("how", KILLS)
def test_a_kill_at_every_change_of_the_disk(
    driver: Driver, undisturbed: dict[str, Undisturbed], spec: str, how: str
) -> None:
    wanted = undisturbed[spec]
    numbers = range(1, wanted.outcome.number(KILLS[how]) + 1)
    tried(assert_survives_death, driver, wanted, [(how, number) for number in numbers])


@soak
@pytest.mark.parametrize("spec", SPECS)
def test_a_kill_in_every_stage(driver: Driver, undisturbed: dict[str, Undisturbed], spec: str) -> None:
    found = stages(undisturbed[spec])
    assert len(found) >= 20 or spec == "merged", found
    tried(assert_survives_death, driver, undisturbed[spec], [("forward", n) for n in found.values()])


@soak
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_of_every_write(
    driver: Driver, undisturbed: dict[str, Undisturbed], spec: str, how: str
) -> None:
    wanted = undisturbed[spec]
    numbers = range(1, wanted.outcome.number(FAILURES[how]) + 1)
    tried(assert_stops_at_failure, driver, wanted, [(how, number) for number in numbers])


@soak
@pytest.mark.parametrize("spec", SPECS)
def test_a_run_that_is_killed_again_and_again_ends(
    driver: Driver, undisturbed: dict[str, Undisturbed], spec: str
) -> None:
    home = driver.home(spec)
    for goes in count(1):
        if driver.run(home, fault=("after", 10 + goes)).status == 0:
            break
        home.check()
        assert goes < 50
    assert goes > 5
    assert_resumed(driver, home, undisturbed[spec])


@soak
def test_a_kill_while_an_old_run_is_cleared(driver: Driver, undisturbed: dict[str, Undisturbed]) -> None:
    wanted, home = undisturbed["merged"], driver.home("merged")
    assert driver.run(home).status == 0
    removals = driver.run(home, "--fresh").number("remove")
    assert removals > 20
    for number in range(1, removals + 1):
        how = ("removed", "unremoved")[number % 2]
        assert driver.run(home, "--fresh", fault=(how, number)).status == -9
        home.check()
        assert_resumed(driver, home, wanted, "--fresh")
