"""What tests, examples and benchmarks name of the package exists, also where this machine skips them."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("tests", "examples", "benchmarks") for path in sorted(ROOT.glob(f"{folder}/**/*.py"))]


def imported_modules(tree: ast.Module) -> dict[str, ModuleType]:
    """Those of the package that the file imports at its top, by the names it gives them."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            names = {name.asname or name.name: import_module(name.name) for name in node.names if is_ours(name.name)}
        elif isinstance(node, ast.ImportFrom) and is_ours(node.module or ""):
            names = {name.asname or name.name: imported_from(node.module, name.name) for name in node.names}
        else:
            continue
        found |= {name: value for name, value in names.items() if isinstance(value, ModuleType)}
    return found


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "bnb_core"


def imported_from(module: str, name: str) -> object:
    try:
        return getattr(import_module(module), name)
    except AttributeError:
        return import_module(f"{module}.{name}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_the_package_exist(path):
    tree = ast.parse(path.read_text())
    try:
        modules = imported_modules(tree)
    except ModuleNotFoundError as error:
        if is_ours(error.name):
            raise
        pytest.skip(f"needs {error.name}")
    absent = [
        f"line {node.lineno}: {node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
        if not hasattr(modules[node.value.id], node.attr)
    ]
    assert absent == []
