"""The programs of `examples/` run as they stand, on the bundled demo model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compilations import UNOPTIMISED

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def printed(compilation_cache: None) -> dict[str, str]:
    """What each example prints, by its name."""
    found = {}
    for example in EXAMPLES:
        ran = subprocess.run(
            [sys.executable, str(example)],
            cwd=ROOT.parent,  # they find the demo model from anywhere
            env=os.environ | UNOPTIMISED | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert ran.returncode == 0, ran.stderr
        found[example.stem] = ran.stdout
    return found


def test_all_examples_are_tested_and_short(printed: dict[str, str]) -> None:
    assert set(printed) == {"compare_residency", "generate", "stream"}
    assert all(len(example.read_text().splitlines()) <= 40 for example in EXAMPLES)


def test_generate_answers_each_question_and_says_what_was_substituted(printed: dict[str, str]) -> None:
    tasks = re.findall(r"task (\w+), ([\d.]+)% of expert choices substituted", printed["generate"])
    assert [task for task, _ in tasks] == ["conv", "clsfy"]
    assert all(0 < float(share) < 100 for _, share in tasks)


def test_stream_prints_an_answer(printed: dict[str, str]) -> None:
    assert len(printed["stream"].split()) >= 3


def test_fewer_experts_substitute_more_and_exact_substitutes_nothing(printed: dict[str, str]) -> None:
    rows = re.findall(r"^ *(\d+)% (\w+) +([\d.]+)% substituted: (.*)$", printed["compare_residency"], re.MULTILINE)
    assert [(int(share), routing) for share, routing, *_ in rows] == [
        (share, routing) for share in (100, 40, 20) for routing in ("resident", "exact")
    ]
    substituted = {(int(share), routing): float(lost) for share, routing, lost, _ in rows}
    assert {lost for (_, routing), lost in substituted.items() if routing == "exact"} == {0.0}
    assert 0 == substituted[100, "resident"] < substituted[40, "resident"] < substituted[20, "resident"]
    answers = {text for share, routing, _, text in rows if routing == "exact" or share == "100"}
    assert len(answers) == 1  # what the fully resident model says, at any share
