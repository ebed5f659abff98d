"""The live grid's bookkeeping, with engines that are none: what is run, reported, saved and drawn."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.residency import __main__ as command
from benchmarks.residency import live
from emoe_jax.errors import EmoeError
from tests.engines import TINY


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory of a model of which nothing is known but its shape."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY))
    return tmp_path / "model"


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """Measurements that follow from share and policy; the engines that were opened."""
    opened: list[tuple[float, str]] = []

    @contextlib.contextmanager
    def engine_of(model: str, share: float, policy: str) -> Iterator[Any]:
        opened.append((share, policy))
        yield share

    def answers(share: Any, per_task: int) -> dict[str, Any]:
        if share == 0.2:
            raise EmoeError("out of luck")
        exact = dict.fromkeys(live.EXACT_TASKS, share)
        return {"exact_match": exact, "perplexity": 2 / share, "substituted": 1 - share, "coverage": share}

    def topic_switch(model: str, share: float, policy: str) -> dict[str, Any]:
        numbers = {"residency": share, "prompts_of_each": 2, "steady_coverage": 0.5, "prompts_to_recover": 0}
        return {"from": "qa", "to": "conv", "coverage_by_prompt": [0.5] * 4} | numbers

    monkeypatch.setattr(live, "engine_of", engine_of)
    monkeypatch.setattr(live, "answers", answers)
    monkeypatch.setattr(live, "decode_ratios", lambda *_: {"decode_ratio_b1": 0.9, "decode_ratio_b16": 1.1})
    monkeypatch.setattr(live, "host_share", lambda _: {"planning_share": 0.01})
    monkeypatch.setattr(live, "topic_switch", topic_switch)
    return opened


def test_the_whole_grid(
    model: Path, engines: list[tuple[float, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, plots = tmp_path / "new" / "out.json", tmp_path / "plots"
    command.main(
        [
            *("--live", str(model), "--live-policies", "lru", "static", "--shares", "1", "0.5", "0.25"),
            *("--json", str(out), "--plots", str(plots)),
        ]
    )
    grid = [(share, policy) for policy in ("lru", "static") for share in (1.0, 0.5, 0.25)]
    assert engines == [(1.0, "static"), *grid]
    results = json.loads(out.read_text())
    assert list(results["live"]) == ["1", "0.5", "0.25"]
    assert results["live"] == results["live_policies"]["lru"]
    assert results["live"]["0.25"]["perplexity_ratio"] == 4
    assert results["live"]["0.25"]["exact_match"] == {"clsfy": 0.25, "comp": 0.25, "qa": 0.25}
    assert results["topic_switch"]["residency"] == 0.4
    assert (plots / "residency_live.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "cell 1 of 6: lru, 100% resident" in printed
    assert "cell 6 of 6: static, 25% resident (0 s per cell, 0 min left)" in printed


def test_a_run_that_fails_leaves_the_cells_before(model: Path, engines: list[tuple[float, str]], tmp_path: Path):
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit):
        command.main(["--live", str(model), "--shares", "0.5", "0.2", "--json", str(out)])
    results = json.loads(out.read_text())
    assert list(results["live"]) == ["0.5"]
    assert list(results["live_policies"]) == ["emoe", "full"]


def test_policies_that_cannot_be_had_are_refused_before_anything_runs(
    model: Path, engines: list[tuple[float, str]], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        command.main(["--live", str(model), "--live-policies", "lru", "next-layer-router"])
    assert "policy 'next-layer-router' needs a table of transitions" in capsys.readouterr().err
    assert engines == []


def test_the_default_grid_is_that_of_replay():
    assert command.parse(["--live", "x"]).shares == [1.0, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2]
