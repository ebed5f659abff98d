"""The mutants still cut what they say, and what becomes of one is told as it is."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.mutants.__main__ import ROOT, main
from tests.mutants.mutant import Mutant, StaleMutant
from tests.mutants.table import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_cuts_its_mechanism(mutant: Mutant) -> None:
    assert mutant.source(ROOT) != (ROOT / mutant.file).read_text(encoding="utf-8")
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {re.escape(name.partition('[')[0])}\(", text, re.MULTILINE), test


def test_names_are_told_apart() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.new, mutant.old) for mutant in MUTANTS}) == len(MUTANTS)


THING = "def twice(number):\n    half = number\n    return half + number\n"
TESTS = (
    "import time\n"
    "from pkg.thing import twice\n"
    "def test_twice():\n    assert twice(2) == 4\n"
    "def test_runs():\n    twice(2)\n"
    "def test_waits():\n    time.sleep(60 if twice(2) != 4 else 0)\n"
    "def test_fails():\n    assert twice(2) == 5\n"
)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A repository of one function."""
    root = tmp_path / "tiny"
    for name, text in {"pkg/__init__.py": "", "pkg/thing.py": THING, "tests/test_thing.py": TESTS}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "untracked.py").write_text("")
    for command in (["init", "--quiet"], ["add", "pkg", "tests"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


def thing(name: str, old: str, new: str, *tests: str, file: str = "pkg/thing.py") -> Mutant:
    return Mutant(name, f"[{name}]", file, old, new, tuple(f"tests/test_thing.py::test_{test}" for test in tests))


def test_each_mutant_gets_its_verdict_and_the_tree_stays_as_it_is(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # loading them takes longer than all else here
    mutants = [
        thing("noticed", "half + number", "half", "runs", "twice"),
        thing("missed", "half + number", "half", "runs"),
        thing("gone", "third", "half", "twice"),
        thing("twofold", "half", "third", "twice"),
        thing("absent", "half + number", "half", "twice", file="pkg/other.py"),
        thing("no Python", "half + number", "half +", "twice"),
        thing("crashes", "half + number", "half + nummer", "twice"),
        thing("waits", "half + number", "half", "waits"),
        thing("never passes", "half + number", "half", "twice", "fails"),
        thing("no such test", "half + number", "half", "nothing"),
    ]
    out = tmp_path / "out.json"
    assert main(["--json", str(out), "--jobs", "2", "--timeout", "5"], mutants[:-1], tiny) == 1
    written = json.loads(out.read_text())
    verdicts = {row["name"]: row["verdict"] for row in written["mutants"]}
    assert verdicts == {
        "noticed": "killed",
        "missed": "survived",
        "gone": "stale",
        "twofold": "stale",
        "absent": "stale",
        "no Python": "stale",
        "crashes": "broken",
        "waits": "hung",
        "never passes": "failing",
    }
    assert written["survivors"] == list(verdicts)[1:]
    details = {row["name"]: row["detail"] for row in written["mutants"]}
    assert details["noticed"] == "tests/test_thing.py::test_twice"
    assert details["gone"] == (
        "gone is stale: pkg/thing.py has 'third' 0 times; a mutant replaces text that stands there once"
    )
    assert "'half' 2 times" in details["twofold"]
    assert "does not exist" in details["absent"]
    assert "no Python with the cut: invalid syntax" in details["no Python"]
    assert "name 'nummer' is not defined" in details["crashes"]
    assert "test_fails failed without the cut: assert 4 == 5" in details["never passes"]
    shown = capsys.readouterr().out
    assert "1 of 9 mutants killed, 1 survived, 4 stale, 1 broken, 1 hung, 1 failing" in shown
    assert (tiny / "pkg/thing.py").read_text() == THING
    assert not list(tiny.rglob("__pycache__"))
    assert main(["--only", "noticed", "--jobs", "1"], mutants, tiny) == 0
    assert "1 of 1 mutants killed\n" in capsys.readouterr().out
    assert main(["--only", "no such test"], mutants, tiny) == 1
    assert "no such test failing: without the cut, ERROR: not found" in capsys.readouterr().out


def test_mutants_are_listed_and_not_tried(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mutants = [thing("one", "a", "b", "x"), thing("two", "a", "b", "x")]
    assert main(["--list", "--only", "two"], mutants, tmp_path / "nowhere") == 0
    shown = capsys.readouterr().out
    assert "[two]" in shown
    assert "[one]" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "three"], "there is no mutant 'three'; --list names them"),
        (["--jobs", "0"], "--jobs is 0; expected at least 1"),
        (["--timeout", "0"], "--timeout is 0; expected more than 0 seconds"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json: its folder does not exist"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments, [thing("one", "a", "b", "x")])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_outside_a_repository_nothing_is_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], [thing("one", "a", "b", "x")], tmp_path) == 2
    assert "git names no files of" in capsys.readouterr().out


def test_a_cut_that_changes_nothing_is_stale(tiny: Path) -> None:
    with pytest.raises(StaleMutant, match="is the same with the cut"):
        thing("same", "half + number", "half + number", "twice").source(tiny)
