"""The layout: imports point one way, files stay short, and nothing of TRL or Accelerate is replaced."""

import ast

import pytest
from conftest import ROOT

PACKAGE = ROOT / "r1dist"
# From the lowest floor to the highest. A package imports from lower floors only.
FLOORS = [
    {"errors", "logs", "shipped", "signals", "tiny"},
    {"files", "config"},
    {"adapters"},
    {"models"},
    {"data", "run"},
    {"rewards", "generation"},
    {"sampling", "gguf", "publish"},
    {"evaluation"},
    {"rl", "sft"},
    {"reward_models"},
    {"pipeline"},
    {"cluster"},
    {"__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in sorted(names)}
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = {path.relative_to(ROOT).with_suffix("").parts: path for path in SOURCES}


def imports(path) -> set[tuple[str, ...]]:
    """The package's modules that a file imports, as dotted names in parts; `from . import x` is x."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        module = (*base, *(node.module.split(".") if node.module else ()))
        if module[0] == "r1dist":
            found |= {(*module, a.name) if (*module, a.name) in MODULES else module for a in node.names}
    return found


def test_every_part_of_the_package_has_a_floor():
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"} == FLOOR.keys()


@pytest.mark.parametrize("name", FLOOR)
def test_imports_point_down(name):
    files = [path for path in SOURCES if path.relative_to(PACKAGE).parts[0].removesuffix(".py") == name]
    assert files
    for path in files:
        for module in imports(path):
            other = module[1]
            assert other == name or FLOOR[other] < FLOOR[name], f"{path} imports {'.'.join(module)}"


def test_no_module_imports_itself_through_others():
    edges = {}
    for name, path in MODULES.items():
        found = {(*m, "__init__") if (*m, "__init__") in MODULES else m for m in imports(path)}
        edges[name] = {m for m in found if m in MODULES and m != name}
    done: set = set()

    def visit(name, above):
        assert name not in above, " -> ".join(".".join(m) for m in (*above, name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_datasets_are_mapped_by_the_one_function_whose_cache_follows_the_code():
    for path in SOURCES:
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        methods = {call.attr for call in calls if isinstance(call, ast.Attribute)}
        assert not methods & {"map", "filter"} or path == PACKAGE / "data" / "mapping.py", path


def test_sizes():
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, path
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").glob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path
    launchers = list((ROOT / "launch").glob("*.py"))
    assert len(launchers) >= 4
    for path in launchers:
        assert len(path.read_text().splitlines()) < 80, path
