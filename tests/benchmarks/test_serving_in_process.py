"""`python -m benchmarks.serving --in-process`, with an engine that needs no model."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.__main__ import main
from serve.start import Loaded
from tests.benchmarks.serving_samples import SAMPLES
from tests.serve.fake import FakeEngine, FakeTokenizer

SHORT = {task: [sample for sample in rows if len(sample.messages[0]["content"]) <= 2] for task, rows in SAMPLES.items()}


class TakingTurns(FakeEngine):
    """Notes which policy each request was admitted by."""

    def __init__(self) -> None:
        super().__init__(FakeTokenizer(), 0.001)
        self.policy = "none"
        self.admitted: list[str] = []
        self.options: Any = None
        self.warm = self.closed = False

    def use_scheduling_policy(self, name: str) -> None:
        assert not self.has_work()
        self.policy = name

    def add_request(self, *request: Any, **of: Any) -> list[int]:
        self.admitted.append(self.policy)
        return super().add_request(*request, **of)

    def state(self) -> dict[str, Any]:
        return {"scheduler": {"policy": self.policy}, "residency": {"loads": {"loads": 7}, "coverage": 0.5}}

    def warm_up(self) -> None:
        assert not self.requests
        self.warm = True

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[TakingTurns]:
    """Those that were loaded."""
    loaded: list[TakingTurns] = []

    def load(options: Any) -> Loaded:
        engine: Any = TakingTurns()
        engine.options = options
        loaded.append(engine)
        return Loaded(engine)

    monkeypatch.setattr("benchmarks.serving.in_process.load_engine", load)
    monkeypatch.setattr("benchmarks.serving.__main__.demo_samples", lambda: SHORT)
    return loaded


def test_policies_take_turns_in_one_engine_per_residency(
    engines: list[TakingTurns], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out.json"
    options = ["--requests", "9", "--rates", "0.5", "--concurrency", "2", "--max-tokens", "3", "--turns", "1"]
    settings = ["--residency", "100%", "40%", "--routing", "resident", "exact", "--seeds", "2", "--without", "dE"]
    assert main(["--in-process", *options, *settings, "--json", str(out), "--server-args", "--seed", "3"]) == 0
    report = json.loads(out.read_text())
    where = [("100%", "resident"), ("40%", "resident"), ("40%", "exact")]
    policies = ["fcfs", "slo", "slo-without-dE"]
    assert [(run["residency"], run["routing"], run["seed"], run["policy"]) for run in report["runs"]] == [
        (*setting, seed, policy) for setting in where for seed in (0, 1) for policy in policies
    ]
    assert {run["requests"] for run in report["runs"]} == {9}
    assert len(report["differences"]) == 6
    assert report["engines"][0] == {"scheduler": {"policy": "slo-without-dE"}, "loads": {"loads": 7}, "coverage": 0.5}
    assert [engine.options.expert_memory for engine in engines] == ["100%", "40%"]
    for engine in engines:
        assert engine.closed
        assert (engine.options.max_num_seqs, engine.options.seed, engine.options.prefix_caching) == (2, 3, False)
    first, second = engines
    measured = ["fcfs"] * 16 + ["slo"] * 16 + ["fcfs"] * 4  # capacity of both, deadlines by the first
    turns = [
        measured + [name for name in order for _ in range(9)]
        for order in (policies, ["slo", "slo-without-dE", "fcfs"])  # by seed
    ]
    turn = turns[0]
    assert first.admitted == [*turns[0], *turns[1]]
    assert second.admitted == 2 * [*turns[0], *turns[1]]
    assert first.warm
    assert second.warm
    assert {request["routing"] for request in first.requests} == {"resident"}
    assert [request["routing"] for request in second.requests] == ["resident"] * 2 * len(turn) + ["exact"] * 2 * len(
        turn
    )
    asked = second.requests[-1]
    assert asked["slo"].latency_ms > 0
    assert asked["params"].max_tokens == 3
    assert "slo-without-dE" in capsys.readouterr().out


def test_a_failed_step_ends_the_run_in_one_line(
    engines: list[TakingTurns], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(TakingTurns, "step", lambda self: (_ for _ in ()).throw(RuntimeError("no")))
    assert main(["--in-process", "--requests", "4", "--concurrency", "2", "--rates", "0.5"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "a request failed" in error
    assert engines[0].closed


def test_it_has_no_servers(capsys: pytest.CaptureFixture[str]):
    assert main(["--in-process", "--url", "http://127.0.0.1:1"]) == 2
    assert capsys.readouterr().err == "error: --in-process has no servers, for --url or --compare-residency\n"
