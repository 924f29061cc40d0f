"""The run folder: what identifies a run, what is in it, and how its files are written."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonlines
import torch
from filelock import FileLock, Timeout

from harness.data import Dataset, Selection
from harness.models import MODELS
from harness.paths import write_atomically, write_json
from harness.spec import RunSpec, hyperparameter_source, upgraded
from reports.record import SCHEMA_VERSION, Record

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "datasets", "lm_eval", "sentence-transformers")
LOCK = ".lock"
SESSION = ("commit", "dirty", "python", "packages", "threads", "kernels")  # sessions may differ
KERNEL_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "MKL_CBWR", "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)  # fmt: skip
STAGES = {  # version of each stage's code: rises when what it leaves on disk would be another
    "editing": 1, "merging": 1, "routing": 1, "scoring": 1, "statistics": 1, "tasks": 1, "texts": 1,
}  # fmt: skip
FOLDERS = ("deltas", "keys", "state", "scores", "figures")
FILES = ("run.json", "records.jsonl", "cases.jsonl.gz", "report.md", "report.tex", "report.html")


class SpecMismatchError(ValueError):
    """A run folder holds a run of another spec, other data or other weights."""


class RunFolder:
    """A folder with its run.json as data; ``note`` keeps both equal.

    It belongs to one process at a time: the lock is the operating system's and goes with its owner.
    """

    def __init__(self, path: Path, info: dict[str, Any], lock: FileLock) -> None:
        self.path, self.info, self._lock = path, info, lock

    def close(self) -> None:
        """Let others have the folder."""
        self._lock.release()

    @classmethod
    def open(
        cls,
        path: Path,
        spec: RunSpec,
        *,
        inputs: Mapping[str, Any],
        provenance: Mapping[str, Any],
        fresh: bool,
    ) -> "RunFolder":
        """Create a folder, or continue one of the same spec and inputs (``fresh``: begin it anew).

        inputs: digests of what the spec only names. Raises ValueError in one line if the folder holds
        anything else, naming the differences, or cannot be written.
        """
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file, not a folder; give another --out")
        is_run = (path / "run.json").is_file()
        if path.exists() and not is_run and set(path.iterdir()) - {path / LOCK, *_unfinished(path)}:
            raise ValueError(f"folder {path} is not empty and holds no run; give another --out")
        lock = locked(path)
        try:
            for temporary in _unfinished(path):
                temporary.unlink(missing_ok=True)
            plain = spec.as_json() | dict(inputs)
            info: dict[str, Any] = {}
            if is_run and not fresh:
                info = _same_run(path / "run.json", plain)
            elif is_run:
                _clear(path)
            session = {name: provenance[name] for name in SESSION}
            info |= {
                "schema_version": SCHEMA_VERSION,
                "run_id": spec.digest(),
                "status": "running",
                "spec": plain,
                "stages": STAGES,
                "model_note": MODELS[spec.model].note if spec.model in MODELS else None,
                "provenance": info.get("provenance", dict(provenance)),
                "sessions": [*info.get("sessions", []), session],
            }
            info.setdefault("timings", {})
            info.setdefault("per_editor", {})
            folder = cls(path, info, lock)
            try:
                folder.note()
            except OSError as error:
                raise _not_writable(path, error) from None
        except BaseException:
            lock.release()
            raise
        return folder

    @property
    def notes(self) -> list[str]:
        """What a report must say of how the folder came about."""
        sessions = self.info["sessions"]  # those of an older version lack a field
        differ = sorted(
            name
            for name in SESSION
            if len({json.dumps(one[name], sort_keys=True) for one in sessions if name in one}) > 1
        )
        if not differ:
            return []
        return [f"The run was continued under changed {', '.join(differ)}; run.json has all sessions."]

    def note(self, **more: Any) -> None:
        """Take up further fields and write run.json."""
        self.info |= more
        write_json(self.path / "run.json", self.info)

    def same(self, name: str, value: Any) -> None:
        """Note a field of the provenance; SpecMismatchError if the folder was made with another value."""
        known = self.info["provenance"].setdefault(name, value)
        if known != value:
            raise SpecMismatchError(
                f"folder {self.path} was made with another {name} ({known} there, {value} now); "
                "give another --out, or --fresh to begin anew"
            )
        self.note()

    def write_records(self, editor: str, records: Iterable[Record], order: Sequence[str]) -> None:
        """Replace an editor's lines in records.jsonl; editors stand in the order given."""
        path = self.path / "records.jsonl"
        lines: list[dict[str, Any]] = []
        if path.is_file():
            with jsonlines.open(path) as reader:
                lines = [line for line in reader if line["editor"] != editor]
        lines += [record.to_json() for record in records]
        lines.sort(key=lambda line: order.index(line["editor"]))

        def write(temporary: Path) -> None:
            with jsonlines.open(temporary, "w") as writer:
                writer.write_all(lines)

        write_atomically(path, write)


def locked(path: Path) -> FileLock:
    """The lock of a folder, which is made if need be; ValueError if another process has it."""
    lock = FileLock(path / LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process is working on folder {path}; wait for its end, or give another --out"
        ) from None
    except OSError as error:
        raise _not_writable(path, error) from None
    return lock


def _not_writable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"folder {path} cannot be written: {error.strerror}; give another --out")


def _same_run(path: Path, plain: Mapping[str, Any]) -> dict[str, Any]:
    """A run.json as data, if its spec is this one."""
    try:
        info: dict[str, Any] = json.loads(path.read_text("utf-8"))
        then = dict(info["spec"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is broken; give another --out, or --fresh to begin anew") from None
    then = upgraded(then)
    stages = info.get("stages", dict.fromkeys(STAGES, 1))
    for what, there, now in (("spec", then, plain), ("version of the code", stages, STAGES)):
        differ = [
            f"{name}: {there.get(name)!r} there, {now.get(name)!r} now"
            for name in sorted(there.keys() | now.keys())
            if there.get(name) != now.get(name)
        ]
        if differ:
            raise SpecMismatchError(
                f"folder {path.parent} holds a run of another {what} ({'; '.join(differ)}); "
                "give another --out, or --fresh to begin anew"
            )
    return info


def _unfinished(folder: Path) -> list[Path]:
    """Temporary files that killed processes left among a run's own files."""
    beside = (path for name in FILES for path in folder.glob(f".{name}.*"))
    within = (path for name in FOLDERS for path in (folder / name).rglob(".*"))
    return [path for path in (*beside, *within) if path.is_file()]


def _clear(folder: Path) -> None:
    """Remove a run's own files, run.json last: until then it is a run; anything else is left."""
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in reversed(FILES):
        (folder / name).unlink(missing_ok=True)


def software(device: str) -> dict[str, Any]:
    """The commit, the packages and the machine that something is made with."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        **_commit(),
        "python": platform.python_version(),
        "packages": versions,
        "machine": {"processor": platform.machine(), "system": platform.system(), "gpu": gpu},
        "threads": torch.get_num_threads(),
        "kernels": kernels(device),
    }


def provenance(spec: RunSpec, dataset: Dataset, selection: Selection, encoder: str | None) -> dict[str, Any]:
    """Everything a figure depends on besides the spec.

    encoder: its identity, None where nothing is routed.
    """
    return {
        **software(spec.device),
        "dataset": {
            "name": dataset.name,
            "source": dataset.source,
            "digest": dataset.digest,
            "dropped": dict(dataset.dropped),
        },
        "encoder": encoder,
        "case_ids": [case.case_id for case in selection.cases],
        "negative_ids": [case.case_id for case in selection.negatives],
        "hyperparameter_sources": {name: hyperparameter_source(spec.model, name) for name in spec.editors},
    }


def kernels(device: str) -> dict[str, Any]:
    """What chooses among kernels whose results differ in their last bits."""
    backends: Any = torch.backends
    chosen = {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cpu_capability": backends.cpu.get_cpu_capability(),
        "mkl": backends.mkl.is_available(),
        "openmp": backends.openmp.is_available(),
        "mkldnn": backends.mkldnn.is_available() and backends.mkldnn.enabled,
        "environment": {name: os.environ[name] for name in KERNEL_VARIABLES if name in os.environ},
    }
    if device.startswith("cuda"):
        chosen |= {
            "cuda_matmul_allow_tf32": backends.cuda.matmul.allow_tf32,
            "cudnn_allow_tf32": backends.cudnn.allow_tf32,
            "cudnn_deterministic": backends.cudnn.deterministic,
            "cudnn_benchmark": backends.cudnn.benchmark,
        }
    return chosen


def _commit() -> dict[str, Any]:
    """The project's commit and whether the tree differs from it; None outside a checkout."""
    root = Path(__file__).parent.parent

    def git(*args: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():  # installed inside somebody else's checkout
        return {"commit": None, "dirty": None}
    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit, "dirty": None if status is None else bool(status)}
