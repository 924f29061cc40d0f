"""The command in processes of its own that are killed, or refused a write, at a chosen point.

One process imports everything once and forks a child per request. A request is a line of JSON on standard
input: ``argv``, the environment's ``cache``, and the ``fault``, if any; the answer is a line of JSON on
standard output: ``status`` (negative: the signal), ``stderr``, and ``events``, everything that the child did
to the disk, as it happened: ``["write", path, digest]``, ``["remove", path]``, ``["mkdir", path]``, and with
``forwards`` in the request ``["forward", what was going on]``. A fault is ``[how, number]``, the number
counting from 1 the events of its kind:

- ``before``, ``half``, ``after``: SIGKILL at a write, before a byte of it is in its temporary file, with half
  of it there, or when it has been renamed;
- ``unremoved``, ``removed``: SIGKILL before or after a removal;
- ``forward``: SIGKILL as a block of the model begins its forward;
- ``full``: from this write on, the system refuses all but the first bytes of every file, whatever library
  writes it, as a full disk does (with the reason of a limit on file sizes: that one needs no other disk);
- ``eio``, ``enospc``, ``nodir``: a write, or the making of a folder of the run, fails with OSError, once.

What an editor costs is not noted, so that reports of equal runs are equal; figures are written, not drawn.
"""

import errno
import gc
import hashlib
import json
import os
import resource
import selectors
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

import harness.folder
import harness.progress
import harness.run
import reports.figures
from benchmarks.tiny import HashedWords
from harness import ablation
from harness.encoders import CachedEncoder
from harness.models import find_model, load_model

KINDS = {
    "before": "write", "half": "write", "after": "write", "full": "write", "eio": "write",
    "enospc": "write", "unremoved": "remove", "removed": "remove", "forward": "forward", "nodir": "mkdir",
}  # fmt: skip


class Disk:
    """Every change of the disk by this process, told as it happens and cut short where asked."""

    def __init__(self, tell: Callable[[Sequence[str]], None], how: str | None, number: int) -> None:
        self.tell, self.how, self.number = tell, how, number
        self.counts = dict.fromkeys(KINDS.values(), 0)
        self.doing = "start"
        self.plain = {name: getattr(os, name) for name in ("replace", "unlink", "remove", "rmdir", "mkdir")}
        os.replace = self.replace
        os.unlink = os.remove = lambda path, **at: self.remove("unlink", path, **at)
        os.rmdir = lambda path, **at: self.remove("rmdir", path, **at)
        os.mkdir = self.mkdir
        self.fill()

    def fill(self) -> None:
        """Refuse all but the first bytes of every file, if the next write is the one."""
        if self.how == "full" and self.counts["write"] == self.number - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))

    def here(self, kind: str) -> str | None:
        """What is to go wrong with the event that begins now, if anything."""
        self.counts[kind] += 1
        at = self.how is not None and KINDS[self.how] == kind and self.counts[kind] == self.number
        return self.how if at else None

    def replace(self, source: Any, target: Any) -> None:
        how = self.here("write")
        if how in ("before", "half"):
            os.truncate(source, 0 if how == "before" else Path(source).stat().st_size // 2)
            kill()
        if how in ("eio", "enospc"):
            raise failure(how)
        content = Path(source).read_bytes()
        self.plain["replace"](source, target)
        self.tell(["write", os.fspath(target), hashlib.sha256(content).hexdigest()])
        if how == "after":
            kill()
        self.fill()

    def remove(self, name: str, path: Any, **at: Any) -> None:
        if Path(path).name.startswith("."):  # a temporary file's
            self.plain[name](path, **at)
            return
        how = self.here("remove")
        if how == "unremoved":
            kill()
        folder = Path(f"/proc/self/fd/{at['dir_fd']}").readlink() if at.get("dir_fd") is not None else Path()
        self.plain[name](path, **at)
        self.tell(["remove", str(folder / path)])
        if how == "removed":
            kill()

    def mkdir(self, path: Any, *mode: Any, **more: Any) -> None:
        new = "run" in Path(path).parts and not Path(path).exists() and Path(path).parent.exists()
        if new and self.here("mkdir"):
            raise failure("enospc")
        self.plain["mkdir"](path, *mode, **more)
        if new:
            self.tell(["mkdir", os.fspath(path)])

    def forward(self, module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, GradientCheckpointingLayer):  # what every block is
            self.tell(["forward", self.doing])
            if self.here("forward"):
                kill()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failure(how: str) -> OSError:
    number = {"eio": errno.EIO, "enospc": errno.ENOSPC}[how]
    return OSError(number, os.strerror(number))


def replaced(owner: Any, **values: Any) -> None:
    for name, value in values.items():
        assert hasattr(owner, name), (owner, name)
        setattr(owner, name, value)


def stand_in() -> None:
    """Put stand-ins where reports would differ by the time, or take time for what is not tested here."""
    replaced(harness.run._Run, _measured=lambda *_, **__: None)
    replaced(harness.folder, _commit=lambda: {"commit": None, "dirty": None})
    words = HashedWords()

    def encoder(name: str, *, cache: Path | None, device: str) -> CachedEncoder:
        return CachedEncoder(words.identity, words, cache=cache)

    replaced(harness.run, encoder=encoder)
    for name in ("_draw_dots", "_draw_lines", "_draw_matrices"):
        replaced(reports.figures, **{name: lambda *_, **__: None})
    replaced(reports.figures, _saved=lambda drawn, kind, title: f"<svg >{kind}: {title}</svg>".encode())


def labelled(disk: Disk) -> None:
    """Let the disk know which stage a run is in."""
    stage = harness.progress.Stage
    begin, update = stage.__init__, stage.update

    def begun(self: Any, display: Any, name: str, total: float) -> None:
        begin(self, display, name, total)
        disk.doing = name

    def updated(self: Any, done: float, detail: str = "") -> None:
        update(self, done, detail)
        disk.doing = f"{self.name}, {detail}" if detail else self.name

    replaced(stage, __init__=begun, update=updated)


def child(request: dict[str, Any], events: int) -> int:
    """The command, in a process of its own; its exit status."""
    how, number = request["fault"] or (None, 0)
    os.environ["SEQMMR_CACHE"] = request["cache"]

    def tell(event: Sequence[str]) -> None:
        os.write(events, (json.dumps(event) + "\n").encode())

    disk = Disk(tell, how, number)
    if request.get("forwards") or how == "forward":
        labelled(disk)
        torch.nn.modules.module.register_module_forward_pre_hook(disk.forward)
    return ablation.main(request["argv"])


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, let the child do what is asked, and tell how it ended."""
    pipes = [os.pipe() for _ in range(2)]
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            (_, said), (_, events) = pipes
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(said, 2)
            status = child(request, events)
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    for _, end in pipes:
        os.close(end)
    said, events = read([source for source, _ in pipes])
    _, code = os.waitpid(pid, 0)
    return {
        "status": os.waitstatus_to_exitcode(code),
        "stderr": said.decode(errors="replace"),
        "events": [json.loads(line) for line in events.splitlines()],
    }


def read(sources: Sequence[int]) -> list[bytes]:
    """All that comes out of some pipes."""
    found = dict.fromkeys(sources, b"")
    with selectors.DefaultSelector() as selector:
        for source in sources:
            selector.register(source, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                part = os.read(key.fd, 1 << 16)
                found[key.fd] += part
                if not part:
                    selector.unregister(key.fd)
                    os.close(key.fd)
    return list(found.values())


def requests() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    torch.set_num_threads(1)
    load_model(
        "tiny", find_model(sys.argv[1]), dtype=torch.float32, device="cpu"
    )  # what it prepares stays prepared
    assert matplotlib.backends.backend_agg
    ablation.quiet_libraries()
    stand_in()
    gc.collect()
    gc.freeze()  # what is imported is never garbage; children collect their own in no time
    answers = os.fdopen(os.dup(1), "w")
    for request in requests():
        print(json.dumps(answered(request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
