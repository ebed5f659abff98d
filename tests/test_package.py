"""What a wheel holds: every package, and every file that is no Python beside it."""

import fnmatch
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGES = ("emoe_jax", "serve", "train", "benchmarks")


def test_the_packages_are_found() -> None:
    patterns = SETUPTOOLS["packages"]["find"]["include"]
    assert all(any(fnmatch.fnmatch(package, pattern) for pattern in patterns) for package in PACKAGES)
    assert not [name for name in ("tests", "examples", "docs") if any(fnmatch.fnmatch(name, one) for one in patterns)]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_of_a_package_is_one(package: str) -> None:
    folders = {file.parent for file in (ROOT / package).rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


@pytest.mark.parametrize("package", PACKAGES)
def test_files_that_are_no_python_go_into_the_wheel(package: str) -> None:
    """`package-data` names them by the package that they lie in, or by one above it."""
    data = SETUPTOOLS["package-data"]
    left_out = []
    for file in (ROOT / package).rglob("*"):
        if file.is_dir() or file.suffix == ".py" or "__pycache__" in file.parts:
            continue
        parts = file.relative_to(ROOT).parts
        named = any(
            fnmatch.fnmatch("/".join(parts[depth:]), pattern)
            for depth in range(1, len(parts))
            for pattern in data.get(".".join(parts[:depth]), [])
        )
        if not named:
            left_out.append("/".join(parts))
    assert not left_out
