"""The library's layers: a package imports only those below it, and no files import each other in circles."""

import ast
import graphlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "emoe_jax"
LAYERS = (
    *(
        "errors",
        "demo",
        "progress",
        "amounts",
        "folders",
        "option_fields",
        "config",
        "requests",
        "engine_config",
        "platforms",
    ),
    *("traces", "predictor", "tasks", "policies", "experts", "scheduling"),
    *("checkpoint", "models", "moe", "attention", "residency", "device", "memory", "planning", "audit", "engine"),
)
"""From the lowest to the highest."""
COMMANDS = ("emoe_jax.checkpoint.convert",)
"""`python -m` of the library itself. They stand above it: nothing imports them."""
LARGEST_SHARE = 0.15
LONGEST_FILE = 400


def files() -> dict[str, Path]:
    """By dotted name; a package by its own."""
    names = {path: path.relative_to(LIBRARY.parent).with_suffix("").parts for path in LIBRARY.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


@cache
def imports() -> dict[str, set[str]]:
    """What each file of the library imports of it, wherever the import stands."""
    found, known = {}, files()
    for name, path in known.items():
        wanted: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                wanted |= {each if each in known else node.module for each in full}
        found[name] = (wanted & known.keys()) - {name}
    return found


def layer_of(name: str) -> str:
    return name.split(".")[1]


def test_every_package_has_a_layer() -> None:
    assert {layer_of(name) for name in files() if "." in name} == set(LAYERS)


def test_a_package_imports_only_what_is_below_it() -> None:
    upward = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if "." in name and name not in COMMANDS
        if "." in other and LAYERS.index(layer_of(other)) > LAYERS.index(layer_of(name))
    ]
    assert not upward


def test_nothing_imports_a_command() -> None:
    assert not {other for others in imports().values() for other in others} & set(COMMANDS)


def test_no_files_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter(imports()).prepare()


@pytest.mark.parametrize("package", ["requests", "scheduling"])
def test_layers_without_tensors_load_no_jax(package: str) -> None:
    modules = sorted(name for name in files() if name.startswith(f"emoe_jax.{package}"))
    code = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=LIBRARY.parent, timeout=120).returncode == 0


def test_no_package_outgrows_the_others() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in files().items()}
    total = sum(lines.values())
    for layer in LAYERS:
        size = sum(count for name, count in lines.items() if "." in name and layer_of(name) == layer)
        assert size <= LARGEST_SHARE * total, f"{layer} has {size} of {total} lines"


def test_no_file_outgrows_a_reader() -> None:
    root = LIBRARY.parent
    tracked = [
        path
        for folder in ("emoe_jax", "serve", "train", "benchmarks", "tests", "examples")
        for path in (root / folder).rglob("*.py")
    ]
    long = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in tracked}
    assert not {name: lines for name, lines in long.items() if lines > LONGEST_FILE}
