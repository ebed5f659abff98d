"""Simulated experts: the engine's slots, planner and policy, with loads on a virtual clock."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving.__main__ import main
from benchmarks.serving.devices import DEMO, DEVICES
from benchmarks.serving.experts import ModelExperts, SimulatedExperts
from benchmarks.serving.settings import Setting
from benchmarks.serving.simulate import simulate
from benchmarks.serving.simulated import Machine, make_policy
from benchmarks.serving.workload import Job, Sample
from emoe_jax.requests.request import SLO, SamplingParams
from emoe_jax.requests.sequence import Sequence
from emoe_jax.residency.admission import ExpertLoading
from emoe_jax.scheduling.plan import PrefillChunk, StepPlan
from tests.benchmarks.serving_samples import SAMPLES

MODEL = ModelExperts.demo()
TIMES = DEMO.experts
assert TIMES is not None


def experts_of(residency: str, routing: str = "resident", seed: int = 0) -> SimulatedExperts:
    assert TIMES is not None
    return SimulatedExperts(MODEL, Setting(residency, routing), TIMES, seed)  # pyright: ignore[reportArgumentType]


def step_of(experts: SimulatedExperts, task: str, tokens: int, name: str = "id") -> tuple[StepPlan, Sequence]:
    sequence = Sequence(name, [0] * tokens, SamplingParams(max_tokens=9), task=task, routing=experts.routing)
    experts.arrived(sequence)
    return StepPlan(prefills=(PrefillChunk(sequence, 0, tokens, True),)), sequence


class Running:
    """A scheduler, as far as a plan is made for its sequences."""

    def __init__(self, *running: Sequence):
        self.running = running


def step(experts: SimulatedExperts, task: str, tokens: int, now: float, name: str = "id"):
    plan, sequence = step_of(experts, task, tokens, name)
    return experts.before_step(plan, Running(sequence), now)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("residency", "share"), [("40%", 0.4), ("25%", 0.25), ("100%", 1.0)])
def test_slots_are_those_of_the_engine(residency: str, share: float):
    experts = experts_of(residency)
    layers, number = experts.table.resident_mask.shape
    assert sum(experts.table.capacities) == int(share * layers * number)
    assert experts.table.resident_mask.sum(1).tolist() == list(experts.table.capacities)


@pytest.mark.parametrize("routing", ["resident", "exact"])
def test_nothing_is_loaded_where_all_are_resident(routing: str):
    experts = experts_of("100%", routing)
    assert sum(step(experts, "conv", 50, 0.0)) == 0
    assert experts.loads.loads == 0


def test_an_exact_step_waits_for_each_absent_expert_that_its_tokens_choose():
    assert TIMES is not None
    experts = experts_of("40%", "exact")
    before = experts.table.resident_mask
    loads = step(experts, "qa", 3, 0.0)
    stats = experts.loads
    assert stats.waited_loads > 0
    assert loads.waited == pytest.approx(stats.waited_loads * TIMES.wait) == pytest.approx(stats.wait_seconds)
    assert stats.bandwidth == pytest.approx(experts.expert_bytes / TIMES.load)
    came = experts.table.resident_mask & ~before
    assert 0 < came.sum() <= stats.waited_loads
    assert experts.table.resident_mask.sum(1).tolist() == list(experts.table.capacities)
    # More tokens choose more of them: what `dE` expects of them, on average.
    for tokens in (1, 10):
        found = []
        for seed in range(40):
            fresh = experts_of("40%", "exact", seed)
            expected = ExpertLoading(MODEL.profile, fresh).experts.wanted("qa", tokens, fresh.table.resident_mask)
            step(fresh, "qa", tokens, 0.0)
            found.append(fresh.loads.waited_loads / expected)
        assert np.mean(found) == pytest.approx(1.0, abs=0.15)


def test_loads_in_the_background_take_their_time_and_no_step_waits():
    assert TIMES is not None
    experts = experts_of("40%")
    at_first = experts.table.resident_mask
    assert sum(step(experts, "qa", 3, 0.0)) == 0
    assert experts.loads.loads == 0
    assert step(experts, "qa", 3, 0.5 * TIMES.load).commits == 0
    assert step(experts, "qa", 3, 1.5 * TIMES.load).commits == pytest.approx(TIMES.commit)
    later = step(experts, "qa", 3, 1e3)
    assert later.waited == 0
    assert later.commits > 0
    assert experts.loads.commit_seconds == pytest.approx(experts.loads.loads * TIMES.commit)
    assert experts.loads.waited_loads == 0
    hot = ExpertLoading(MODEL.profile, experts).experts
    assert hot.missing("qa", experts.table.resident_mask) < hot.missing("qa", at_first)


def test_a_policy_is_told_what_an_engine_tells_it():
    experts = experts_of("40%", "exact")
    policy = make_policy("slo", DEMO, experts)
    known = {name: task.output_length.mean for name, task in MODEL.profile.tasks.items() if task.output_length}
    told = policy.state()["output_tokens"]
    assert {name: told[name] for name in known} == known
    sequence = Sequence("id", [0] * 20, task="sum", routing="exact")
    step(experts, "qa", 20, 0.0)
    loading = ExpertLoading(experts.profile, experts)
    assert policy._loading_seconds(sequence) == loading.seconds(sequence) > 0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("policy", ["fcfs", "slo", "slo-without-guard"])
@pytest.mark.parametrize("routing", ["resident", "exact"])
def test_every_request_is_answered_and_a_seed_says_it_all(policy: str, routing: str):
    jobs = [Job(0.03 * i, task, Sample(30, 3 + i % 5), SLO()) for i, task in enumerate(8 * ["qa", "conv", "sum"])]
    machine = Machine(DEMO, Setting("40%", routing), MODEL)  # pyright: ignore[reportArgumentType]
    records = machine.run(jobs, policy, 3)
    assert [len(record.token_times) for record in records] == [job.sample.output_tokens for job in jobs]
    assert machine.run(jobs, policy, 3) == records
    whole = simulate(jobs, DEMO, make_policy(policy, DEMO), 3)
    slower = np.mean([record.latency for record in records]) / np.mean([record.latency for record in whole])
    assert slower > (1.5 if routing == "exact" else 0.99)


def test_deadlines_and_capacity_are_those_of_the_setting():
    samples = {"qa": SAMPLES["short"], "conv": SAMPLES["long"]}
    machines = [Machine(DEMO, Setting(share, "exact"), MODEL) for share in ("100%", "40%")]
    all_resident, some = (machine.slos(samples, 5.0) for machine in machines)
    for task in samples:
        for name in ("ttft_ms", "latency_ms"):
            assert getattr(some[task], name) > 1.3 * getattr(all_resident[task], name)
    jobs = [Job(0.0, "qa", Sample(20, 5), SLO())] * 30
    assert machines[1].capacity(jobs) < 0.8 * machines[0].capacity(jobs)


def test_the_command_runs_every_setting_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    options = ["--residency", "100%", "40%", "--routing", "resident", "exact", "--without", "dE", "--rates", "0.9"]
    assert main(["--simulate", "--requests", "20", *options, "--seed", "5", "--seeds", "2", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    settings = [("100%", "resident"), ("40%", "resident"), ("40%", "exact")]
    policies = ["fcfs", "slo", "slo-without-dE"]
    assert [(run["residency"], run["routing"], run["seed"], run["policy"]) for run in report["runs"]] == [
        (*setting, seed, policy) for setting in settings for seed in (5, 6) for policy in policies
    ]
    assert len({run["capacity_rps"] for run in report["runs"]}) == 3
    assert len(report["intervals"]) == 9
    assert [(row["policy"], row["against"]) for row in report["differences"]] == 3 * [
        ("slo", "fcfs"),
        ("slo-without-dE", "slo"),
    ]
    assert "slo-without-dE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "mixtral-8x7b", "--residency", "40%"], "--residency and --routing need the demo device"),
        (["--residency", "5%"], "expert memory of 5% gives"),
        (["--residency", "lots"], "expert memory 'lots' is not an amount"),
        (["--seeds", "2", "--plot", "a.png"], "--plot draws one setting and one seed"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["--simulate", "--requests", "4", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_only_the_demo_has_experts_to_simulate():
    assert [name for name, device in DEVICES.items() if device.experts is not None] == ["demo"]
