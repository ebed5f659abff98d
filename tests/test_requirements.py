"""The lists of tested versions are complete, and within what `pyproject.toml` allows."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LISTS = sorted((ROOT / "requirements").glob("py*.txt"))


def versions_in(path: Path) -> dict[str, str]:
    """Versions by package."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def wanted(extra: str) -> list[Requirement]:
    """The base dependencies and those of an extra, of the extras that it includes too."""
    found = [*map(Requirement, PROJECT["dependencies"])]
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name == PROJECT["name"]:
            found += [one for name in sorted(requirement.extras) for one in wanted(name)]
        else:
            found.append(requirement)
    return found


def test_there_is_a_list_for_python_3_11() -> None:
    assert "py311.txt" in [path.name for path in LISTS]


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_all_that_the_tests_need_was_tested_in_an_allowed_version(path: Path) -> None:
    versions = versions_in(path)
    missing = [one.name for one in wanted("test") if canonicalize_name(one.name) not in versions]
    assert not missing
    beyond = {
        one.name: versions[canonicalize_name(one.name)]
        for one in wanted("test")
        if not one.specifier.contains(versions[canonicalize_name(one.name)], prereleases=True)
    }
    assert not beyond


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_nothing_of_one_machine_is_listed(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line) or line.startswith("emoe")]


def test_each_jax_line_has_the_python_that_its_name_says() -> None:
    lines = {path.stem: ".".join(versions_in(path)["jax"].split(".")[:2]) for path in LISTS}
    assert lines["py311"] == "0.10"
    assert {line for name, line in lines.items() if name != "py311"} <= {"0.11", "0.12"}
