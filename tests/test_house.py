"""The shape of the house: imports point one way, and no file grows without a limit."""

import ast

import pytest
from conftest import ROOT

# Folder -> folders of the package that it must not know.
FORBIDDEN = {
    "rewards": {"train", "recipe", "rollout", "evaluate", "report", "data"},
    "rollout": {"train", "recipe", "rewards", "evaluate", "report", "data"},
    "data": {"train", "recipe", "rollout", "evaluate", "report", "rewards"},
    "tiny": {"train", "recipe", "rollout", "evaluate", "report", "rewards", "data"},
    "evaluate": {"train", "recipe", "report", "curate"},
    "curate": {"train", "recipe", "report", "evaluate"},
    "train": {"recipe", "curate"},
    "report": {"recipe", "train", "evaluate", "curate"},
}
SOURCES = sorted((ROOT / "r1dist").rglob("*.py"))


def imported_folders(path) -> set[str]:
    """The package's folders that a file imports from, relative imports resolved."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = (*base, *(node.module or "").split("."))
            if parts[0] == "r1dist" and len(parts) > 1:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_one_way(folder):
    files = [path for path in SOURCES if path.relative_to(ROOT / "r1dist").parts[0] == folder]
    assert files
    for path in files:
        assert not imported_folders(path) & FORBIDDEN[folder], path


def test_sizes():
    for path in [*SOURCES, *(ROOT / "tests").glob("*.py"), *(ROOT / "bench").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path
    launchers = list((ROOT / "launch").glob("*.py"))
    assert len(launchers) >= 4
    for path in launchers:
        assert len(path.read_text().splitlines()) < 80, path
