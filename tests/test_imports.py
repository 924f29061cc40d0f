"""The import contract: harness imports the leaf packages; they import neither it nor each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = ("editors", "merging", "routing", "tasks", "reports")
OURS = {*LEAVES, "harness", "benchmarks", "studies", "tests", "scripts"}


def imported(path: Path) -> set[str]:
    """Top-level packages a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("" if node.level else (node.module or "").split(".")[0])
    return names


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no files in {package}"
    return found


@pytest.mark.parametrize("package", LEAVES)
def test_leaves_import_only_themselves(package: str) -> None:
    for path in files(package):
        foreign = imported(path) & (OURS - {package})
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


def test_harness_imports_no_tests_and_no_benchmarks() -> None:
    for path in files("harness"):
        assert not imported(path) & {"benchmarks", "studies", "tests", "scripts"}, path


@pytest.mark.parametrize(
    ("package", "unwanted"),
    [("merging", {"transformers"}), ("routing", {"transformers", "openai", "sentence_transformers"}),
     ("reports", {"torch", "transformers"}), ("editors", {"lm_eval", "datasets"})],
)  # fmt: skip
def test_no_package_knows_more_than_it_needs(package: str, unwanted: set[str]) -> None:
    for path in files(package):
        assert not imported(path) & unwanted, path
