"""How a part is timed, and what it reports."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

A = TypeVar("A")
T = TypeVar("T")
PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6}


@dataclass(frozen=True, kw_only=True)
class Result:
    """Medians of one part, in ``unit``; a value of None was not measured, and the setting says why."""

    name: str
    value: float | None
    unit: str
    baseline: float | None
    repeats: int
    device: str
    setting: str

    @property
    def ratio(self) -> float | None:
        """How many times as much the baseline takes."""
        return None if self.value is None or self.baseline is None else self.baseline / self.value

    def as_json(self) -> dict[str, Any]:
        """The fields of the report, in its order."""
        return {
            "name": self.name, "value": self.value, "unit": self.unit, "baseline": self.baseline,
            "ratio": self.ratio, "repeats": self.repeats, "device": self.device, "setting": self.setting,
        }  # fmt: skip


def not_measured(name: str, reason: str) -> Result:
    return Result(
        name=name, value=None, unit="", baseline=None, repeats=0,
        device="gpu" if name.endswith("@gpu") else "cpu", setting=f"not measured: {reason}",
    )  # fmt: skip


def compared(
    part: str,
    unit: str,
    device: torch.device,
    values: Sequence[float],
    baselines: Sequence[float],
    setting: str,
) -> Result:
    """Medians of several samples of either side: seconds where ``unit`` is one of time, else in ``unit``.

    No baselines: there is none.
    """
    gpu = device.type == "cuda"
    return Result(
        name=f"{part}@gpu" if gpu else part,
        value=_scale(unit) * statistics.median(values),
        unit=unit,
        baseline=_scale(unit) * statistics.median(baselines) if baselines else None,
        repeats=len(values),
        device=torch.cuda.get_device_name(device) if gpu else "cpu",
        setting=setting,
    )


def _scale(unit: str) -> float:
    return PER_SECOND.get(unit.partition("/")[0], 1.0)


def each(run: Callable[[A], T], items: Iterable[A]) -> tuple[list[float], list[T]]:
    """Seconds of a call on every item, and what the calls return."""
    times: list[float] = []
    found: list[T] = []
    for item in items:
        start = _now()
        found.append(run(item))
        times.append(_now() - start)
    return times, found


def repeated(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of a call, several times; what it returns is not kept."""

    def once(_: int) -> None:
        run()

    return each(once, range(repeats))[0]


def _now() -> float:
    """The wall clock, once what is queued on a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def between(times: Sequence[float], unit: str) -> str:
    """The smallest and largest of some seconds, in a unit."""
    return f"{shown(_scale(unit) * min(times))} to {shown(_scale(unit) * max(times))} {unit}"


def shown(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def agreement(what: str, difference: float, most: float) -> str:
    """How far the two sides' results are apart, as a text; RuntimeError if further than ``most``."""
    if not difference <= most:
        raise RuntimeError(f"{what} of the two sides are {difference:.1e} apart, more than {most:.0e}")
    return f"{what} are equal" if difference == 0 else f"{what} agree to {difference:.0e}"


def apart(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|."""
    one, other = one.double().cpu(), other.double().cpu()
    return float((one - other).norm() / other.norm())


def peak_bytes() -> int:
    """Most memory resident so far; what getrusage says of a child counts its parent's too."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("the system does not say how much memory was resident")
