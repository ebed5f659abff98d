"""`python -m benchmarks.serving --simulate --replicas`: several engines behind a routing."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.__main__ import main
from benchmarks.serving.arrivals import poisson
from benchmarks.serving.devices import DEMO
from benchmarks.serving.fleet import Fleet
from benchmarks.serving.replicas import HOT, SHIFT_SECONDS, draw
from benchmarks.serving.report import summary
from benchmarks.serving.settings import Setting
from benchmarks.serving.simulate import SimulatedEngine, simulate
from benchmarks.serving.simulated import machine_of, make_policy
from benchmarks.serving.workload import Job, demo_samples, task_slos
from emoe_jax.scheduling.replicas import ROUTINGS, make_routing
from tests.benchmarks.serving_samples import SAMPLES

SLOS = task_slos(SAMPLES, DEMO.cost, 5.0)
MACHINE = machine_of(DEMO, Setting("40%", "resident"), traced=False)


def jobs_of(traffic: str, rate: float, count: int, seed: int = 0) -> list[Job]:
    return draw(poisson(rate, count, seed), SAMPLES, SLOS, traffic, seed)


def plain_fleet(count: int, routing: str, seed: int = 0) -> Fleet:
    """Of engines with all experts resident."""
    engines = [SimulatedEngine(DEMO, make_policy("slo", DEMO), seed) for _ in range(count)]
    return Fleet(engines, make_routing(routing), seed)


@pytest.mark.parametrize("rate", [2.0, 80.0, 2000.0])
def test_one_replica_is_the_engine_alone(rate: float):
    jobs = jobs_of("mixed", rate, 100)
    fleet = plain_fleet(1, "least-loaded", seed=3)
    found = fleet.run(jobs)
    alone = simulate(jobs, DEMO, make_policy("slo", DEMO), seed=3)
    assert fleet.engines[0].records() == alone
    assert summary(alone[20:]).items() <= found.items()
    assert (found["coverage"], found["loads_per_request"], found["busiest"]) == (None, 0.0, 1.0)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_request_is_answered_once_by_one_replica(routing: str):
    jobs = jobs_of("mixed", 200.0, 200)
    fleet = plain_fleet(4, routing)
    fleet.run(jobs)
    answered = [record for engine in fleet.engines for record in engine.records()]
    assert sorted((record.job for record in answered), key=lambda job: job.arrival) == jobs
    assert all(len(record.token_times) == record.job.sample.output_tokens for record in answered)
    assert sum(fleet.assigned) == 160  # after the warm-up
    assert all(engine.unfinished == 0 for engine in fleet.engines)


def test_a_router_knows_each_load_and_what_was_published():
    seen = []

    class Watching:
        def choose(self, candidates, asked, rng: random.Random):
            seen.append((candidates[:], asked))
            return candidates[len(seen) % 2]

    engines = [
        SimulatedEngine(DEMO, make_policy("slo", DEMO, experts), experts=experts)
        for experts in (MACHINE.experts(0), MACHINE.experts(1))
    ]
    jobs = draw(poisson(300.0, 150, 0), demo_samples(5), dict.fromkeys(demo_samples(1), SLOS["short"]), "mixed", 0)
    Fleet(engines, Watching()).run(jobs)
    assert [asked.task for _, asked in seen] == [job.task for job in jobs]
    assert all(asked.prefix for _, asked in seen)
    assert [candidate.load for candidate in seen[0][0]] == [0, 0]
    assert [candidate.load for candidate in seen[1][0]] == [0, 1]
    assert seen[0][0][0].serves is None  # nothing is published before the first turn
    last = seen[-1][0][0].serves
    assert last is not None
    assert {"qa", "conv", "sum", "comp", "clsfy", "other"} == set(last)
    assert all(0 < share < 1 for share in last.values())


def test_traffic_has_the_shares_that_it_says():
    jobs = jobs_of("skewed", 100.0, 3000)
    assert sum(job.task == "long" for job in jobs) / 3000 == pytest.approx(HOT, abs=0.03)
    shifting = jobs_of("shifting", 400.0, 3000)
    hot = {
        turn: Counter(job.task for job in shifting if int(job.arrival / SHIFT_SECONDS) == turn).most_common(1)[0][0]
        for turn in range(3)
    }
    assert hot == {0: "long", 1: "short", 2: "long"}


def run_command(tmp_path: Path, *more: str) -> list[dict[str, Any]]:
    out = tmp_path / "out.json"
    options = ["--simulate", "--replicas", "4", "--requests", "300", "--rates", "0.5", "--traffic", "mixed", *more]
    assert main([*options, "--json", str(out)]) == 0
    return json.loads(out.read_text())["runs"]


def test_task_affinity_raises_coverage_and_a_seed_says_it_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    samples = demo_samples(20)
    monkeypatch.setattr("benchmarks.serving.replicas.demo_samples", lambda: samples)
    monkeypatch.setattr("benchmarks.serving.replicas.SATURATED", 100)
    runs = run_command(tmp_path, "--replica-routing", "random", "task-affine")
    by_routing = {run["replica_routing"]: run for run in runs}
    assert by_routing["task-affine"]["coverage"] > by_routing["random"]["coverage"] + 0.02
    assert by_routing["task-affine"]["loads_per_request"] < by_routing["random"]["loads_per_request"]
    assert [run["threshold"] for run in runs] == [None, 2]
    assert "task-affine" in capsys.readouterr().out
    again = run_command(tmp_path, "--replica-routing", "task-affine")
    assert again == [by_routing["task-affine"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "2"], "--replicas is for --simulate"),
        (["--simulate", "--replicas", "2", "--plot", "a.png"], "--replicas is for --simulate, without"),
        (["--simulate", "--replicas", "2", "--device", "mixtral-8x7b"], "need the demo device"),
        (["--simulate", "--replicas", "2", "--threshold", "-1", "--requests", "9"], "threshold is -1"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("error: ")
