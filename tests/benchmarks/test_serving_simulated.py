"""`python -m benchmarks.serving --simulate`: the scheduler on a virtual clock."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving.__main__ import main
from benchmarks.serving.arrivals import poisson, read_trace
from benchmarks.serving.devices import DEMO, DEVICES
from benchmarks.serving.report import Record, summary
from benchmarks.serving.simulate import capacity, simulate
from benchmarks.serving.simulated import make_policy
from benchmarks.serving.workload import Job, Sample, demo_samples, drawn, replayed, task_slos
from emoe_jax.requests.request import SLO
from emoe_jax.scheduling.registry import SCHEDULING_POLICIES
from tests.benchmarks.serving_samples import SAMPLES

KEYS = {"policy", "rate_fraction", "slo_attainment", "mean_latency_s", "p99_ttft_s", "goodput_rps", "throughput_tok_s"}
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def jobs_at(rate: float, count: int, seed: int = 0) -> list[Job]:
    return drawn(poisson(rate, count, seed), SAMPLES, task_slos(SAMPLES, DEMO.cost, 5.0), seed)


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rate", [0.5, 500.0])
def test_every_request_is_answered_in_full_and_once(policy: str, device: str, rate: float):
    jobs = jobs_at(rate, 120)
    records = simulate(jobs, DEVICES[device], make_policy(policy, DEVICES[device]), seed=1)
    assert [record.job for record in records] == jobs
    for record in records:
        assert len(record.token_times) == record.job.sample.output_tokens
        assert list(record.token_times) == sorted(record.token_times)
        assert record.started is not None
        assert record.job.arrival <= record.started < record.token_times[0]
    # a token takes a step of its own, whatever else is in it
    steps = {time for record in records for time in record.token_times}
    assert all(len(set(record.token_times)) == len(record.token_times) for record in records)
    assert len(steps) <= sum(job.sample.output_tokens for job in jobs)


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
def test_a_seed_says_it_all(policy: str):
    runs = [simulate(jobs_at(20.0, 80), DEMO, make_policy(policy, DEMO), seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert [record.token_times for record in runs[0]] != [record.token_times for record in runs[2]]
    assert jobs_at(20.0, 80, seed=1) != jobs_at(20.0, 80, seed=2)


def test_idle_requests_take_what_the_cost_model_says():
    quiet = dataclasses.replace(DEMO, noise=0.0)
    (job,) = jobs_at(1.0, 1)
    (record,) = simulate([job], quiet, make_policy("slo", quiet))
    sample = job.sample
    ttft = quiet.cost.seconds(0, sample.prompt_tokens, 1)
    assert record.ttft == pytest.approx(ttft)
    assert record.latency == pytest.approx(ttft + (sample.output_tokens - 1) * quiet.cost.seconds(1))
    assert record.wait == 0
    assert record.attained


def test_the_machine_cannot_do_more_than_its_capacity():
    jobs = jobs_at(1.0, 300)
    limit = capacity(jobs, DEMO, make_policy("fcfs", DEMO))
    for factor, low, high in ((0.5, 0.4, 0.6), (3.0, 0.8, 1.1)):
        records = simulate(jobs_at(factor * limit, 300), DEMO, make_policy("fcfs", DEMO))
        assert low * limit < summary(records)["throughput_rps"] < high * limit


def test_the_command_writes_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("benchmarks.serving.simulated.demo_samples", lambda: SAMPLES)
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--simulate", "--requests", "60", "--rates", "0.7", "0.95", "--json", str(out), "--plot", str(plot)]
    assert main(options) == 0
    report = json.loads(out.read_text())
    assert report["device"] == "demo"
    order = [(run["rate_fraction"], run["policy"]) for run in report["runs"]]
    assert order == [(0.7, "fcfs"), (0.7, "slo"), (0.95, "fcfs"), (0.95, "slo")]
    for run in report["runs"]:
        assert run.keys() >= KEYS
        assert run["requests"] == 60
        assert 0 <= run["slo_attainment"] <= 1
        assert run["p50_latency_s"] <= run["p90_latency_s"] <= run["p99_latency_s"]
    assert plot.stat().st_size > 10_000
    assert "SLO attainment per task" in capsys.readouterr().out
    again = tmp_path / "again.json"
    assert main([*options[:6], "--json", str(again)]) == 0
    assert json.loads(again.read_text()) == report


def test_traces_are_replayed_as_tasks(tmp_path: Path):
    for name, rows in (("code", ["00:00:01.0000000,900,10", "00:00:03.0000000,800,20"]), ("conv", ["00:00:00,50,200"])):
        lines = "".join(f"2023-11-16 {row}\n" for row in rows)
        (tmp_path / f"{name}.csv").write_text(TRACE + lines)
    out = tmp_path / "out.json"
    paths = [str(tmp_path / "code.csv"), str(tmp_path / "conv.csv")]
    options = ["--simulate", "--device", "mixtral-8x7b", "--rates", "0.5", "--json", str(out), "--trace", *paths]
    assert main(options) == 0
    report = json.loads(out.read_text())
    assert report["workload"] == "code, conv"
    assert set(report["runs"][0]["slo_attainment_per_task"]) == {"code", "conv"}
    traces = {Path(path).stem: read_trace(path) for path in paths}
    assert [row.arrival for row in traces["code"]] == [0.0, 2.0]  # from its own first request on
    jobs = replayed(traces, dict.fromkeys(traces, SLO()), 4.0)
    assert [(job.task, job.arrival) for job in jobs] == [("code", 0.0), ("conv", 0.0), ("code", 0.5)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("A,B\n1,2\n", "no column TIMESTAMP"),
        (TRACE, "no requests"),
        (TRACE + "2023-11-16 18:01:00,many,3\n", "line 2: invalid literal"),
        (TRACE + "yesterday,1,3\n", "line 2: Invalid isoformat"),
        (TRACE + "2023-11-16 18:01:00,-1,3\n", "cannot be negative"),
        (TRACE + "2023-11-16 18:01:00\n", "line 2"),
        (None, "No such file"),
    ],
)
def test_a_bad_trace_is_one_line(content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "trace.csv"
    if content is not None:
        path.write_text(content)
    assert main(["--simulate", "--trace", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_two_traces_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = [tmp_path / folder / "a.csv" for folder in ("x", "y")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(TRACE + "2023-11-16 18:01:00,1,3\n")
    assert main(["--simulate", "--trace", *map(str, paths)]) == 2
    assert capsys.readouterr().err == "error: two traces have the same name; each must be a task of its own\n"


def test_poisson_arrivals_have_the_rate():
    times = poisson(8.0, 4000, seed=0)
    gaps = np.diff([0.0, *times])
    assert min(gaps) > 0
    assert np.mean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert np.std(gaps) == pytest.approx(1 / 8, rel=0.1)  # exponential: as large as the mean


def test_tasks_are_drawn_uniformly():
    jobs = jobs_at(1.0, 2000)
    assert np.mean([job.task == "short" for job in jobs]) == pytest.approx(0.5, abs=0.05)
    assert {job.sample.output_tokens for job in jobs if job.task == "long"} == {6, 60}


def test_the_demo_tasks_have_conversations_and_lengths():
    samples = demo_samples(3)
    assert sorted(samples) == ["clsfy", "comp", "conv", "qa", "sum"]
    for rows in samples.values():
        assert len(rows) == 3
        for sample in rows:
            assert sample.messages[-1]["role"] == "user"
            assert sample.prompt_tokens > 3
            assert sample.output_tokens > 1


def test_a_summary_by_hand():
    slo = SLO(ttft_ms=1000, latency_ms=3000)
    records = [
        Record(Job(1.0, "a", Sample(5, 3), slo), (1.5, 2.0, 3.0), 1.25, False),
        Record(Job(2.0, "b", Sample(5, 1), slo), (5.0,), 4.0, True),
    ]
    found = summary(records)
    assert (found["requests"], found["unattainable"], found["max_wait_s"]) == (2, 1, 2.0)
    assert found["slo_attainment"] == 0.5
    assert found["slo_attainment_per_task"] == {"a": 1.0, "b": 0.0}
    assert found["mean_latency_s"] == 2.5
    assert found["throughput_tok_s"] == 4 / 4.0
    assert found["goodput_rps"] == 1 / 4.0
    assert found["p50_ttft_s"] == pytest.approx(1.75)
    assert found["p50_tpot_s"] == 0.75  # of the first alone: the other has one token
    assert found["p50_itl_s"] == 0.75
    assert summary([record.later(7.0) for record in records]) == found
    outside = [Record(record.job, record.token_times) for record in records]
    assert summary(outside) == found | {"unattainable": None, "max_wait_s": None}
