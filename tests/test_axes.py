"""The table of axes in `emoe_jax/config.py`: each axis of an annotation or a comment has its entry, once."""

import ast
import functools
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

import emoe_jax.config

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for name in ("emoe_jax", "train", "serve", "benchmarks", "tests", "examples")
    for path in (ROOT / name).rglob("*.py")
)
NAME = re.compile(r"[A-Za-z_]\w*")
SHAPE = re.compile(r"\[([\w*+ ]+(?:, [\w*+ ]+)*)\]")


def table() -> list[str]:
    """The names of the table, in its order. An entry begins four columns in; its meaning follows two spaces later."""
    assert emoe_jax.config.__doc__ is not None
    entries = re.findall(r"^ {4}(\S+(?: \S+)*)(?:  |$)", emoe_jax.config.__doc__, re.MULTILINE)
    return [name for entry in entries for name in entry.split(", ")]


def annotated(source: str) -> Iterator[tuple[int, str]]:
    """The lines and texts of the axes that annotations such as `Float[Array, "B T"]` name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:
            axes = node.slice.elts[1]
            is_array = isinstance(node.value, ast.Name) and hasattr(jaxtyping, node.value.id)
            if is_array and isinstance(axes, ast.Constant) and isinstance(axes.value, str):
                yield axes.lineno, axes.value


def commented(source: str) -> Iterator[tuple[int, str]]:
    """The lines and texts of shapes such as `[B, T]` in comments and docstrings: those that begin with a capital."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.string.startswith('"""')):
            for shape in SHAPE.findall(token.string):
                if re.fullmatch(r"[A-Z]\w?", shape.split(", ")[0]):
                    yield token.start[0], shape


@functools.cache
def named(source: str) -> list[tuple[int, str]]:
    return [(line, name) for line, axes in [*annotated(source), *commented(source)] for name in NAME.findall(axes)]


def unknown(source: str) -> list[tuple[int, str]]:
    names = set(table())
    return [(line, name) for line, name in named(source) if name not in names]


def test_each_axis_has_its_entry() -> None:
    missing = {f"{path.relative_to(ROOT)}:{line}": name for path in SOURCES for line, name in unknown(path.read_text())}
    assert not missing, "name these axes as the table in emoe_jax/config.py does, or add an entry"


def test_each_entry_is_used_and_occurs_once() -> None:
    used = {name for source in map(Path.read_text, SOURCES) for _, name in named(source)}
    assert [name for name, count in Counter(table()).items() if count > 1] == []
    assert set(table()) - used == set()


@pytest.mark.parametrize(
    "source",
    [
        'def f(x: Float[Array, "B Z"]) -> None: ...',
        'x: Int[np.ndarray, " zebras"]',
        'x: Int[np.ndarray | Array, "*zebras E"]',
        "x = 1  # [B, Z]",
        '"""Rows `[R, ZZ]`."""',
    ],
)
def test_a_name_of_its_own_is_found(source: str) -> None:
    assert len(unknown(source)) == 1
