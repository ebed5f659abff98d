"""`python -m benchmarks.serving` against a server that needs no model."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.serving.__main__ import main
from benchmarks.serving.compare import Batches
from benchmarks.serving.live import Traffic
from benchmarks.serving.server import REPOSITORY, started_server
from emoe_jax.device.kv_cache import page_bytes
from emoe_jax.models import config_from_directory
from emoe_jax.requests.request import SLO
from serve.options import DEMO_MODEL
from tests.benchmarks.fake_server import LOG, STEP, TOKENS
from tests.benchmarks.serving_samples import SAMPLES

FAKE = "tests.benchmarks.fake_server"
KEYS = {"policy", "rate_fraction", "slo_attainment", "mean_latency_s", "p99_ttft_s", "goodput_rps", "throughput_tok_s"}


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Servers are fake ones that say here that they were started."""
    path = tmp_path / "log"
    monkeypatch.setenv(LOG, str(path))
    monkeypatch.setattr("benchmarks.serving.server.MODULE", FAKE)
    monkeypatch.setattr("benchmarks.serving.__main__.demo_samples", lambda: SAMPLES)
    return path


def started(log: Path) -> list[tuple[int, list[str]]]:
    """Process and arguments of every server that was started."""
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def assert_none_is_left(log: Path) -> None:
    for pid, _ in started(log):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_every_policy_gets_a_server_and_every_rate(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    options = ["--requests", "20", "--rates", "0.4", "0.6", "--concurrency", "3", "--json", str(out)]
    assert main(options) == 0
    report = json.loads(out.read_text())
    order = [(run["rate_fraction"], run["policy"]) for run in report["runs"]]
    assert order == [(0.4, "fcfs"), (0.4, "slo"), (0.6, "fcfs"), (0.6, "slo")]
    assert report["capacity_rps"] == pytest.approx(sum(report["capacity_rps_each"].values()) / 2)
    for run in report["runs"]:
        assert run.keys() >= KEYS
        assert run["requests"] == 20
        assert run["rate_rps"] == pytest.approx(run["rate_fraction"] * run["capacity_rps"])
        assert run["p50_ttft_s"] >= STEP
        assert run["p50_latency_s"] >= STEP * TOKENS["short"]
        assert run["p50_ttft_s"] < run["p50_latency_s"] <= run["p99_latency_s"]
        assert run["goodput_rps"] == pytest.approx(run["slo_attainment"] * run["throughput_rps"])
        assert set(run["slo_attainment_per_task"]) == {"short", "long"}
        assert run["max_wait_s"] is None
    first, second = report["runs"][:2]  # the same requests: as many tokens
    tokens = [run["throughput_tok_s"] / run["throughput_rps"] for run in (first, second)]
    assert tokens[0] == pytest.approx(tokens[1])
    # five idle requests, each task's deadlines a multiple of them
    assert report["slos"]["long"]["latency_ms"] > report["slos"]["short"]["latency_ms"] >= 5e3 * STEP * TOKENS["short"]
    assert [arguments[arguments.index("--scheduling-policy") + 1] for _, arguments in started(log)] == ["fcfs", "slo"]
    assert_none_is_left(log)
    assert "SLO attainment per task" in capsys.readouterr().out


def test_a_running_server_is_measured_with_the_policy_it_has(tmp_path: Path):
    out = tmp_path / "out.json"
    with started_server(["--scheduling-policy", "fcfs"]) as url:
        assert httpx.get(f"{url}/v1/emoe/state").json()["compiled"]  # measured once nothing is left to be compiled
        options = ["--requests", "8", "--rates", "0.5", "--concurrency", "2", "--max-tokens", "9", "--json", str(out)]
        assert main(["--url", url, *options]) == 0
        bodies = httpx.get(f"{url}/v1/emoe/state").json()["bodies"]
    report = json.loads(out.read_text())
    assert [run["policy"] for run in report["runs"]] == ["fcfs"]
    assert len(bodies) == 8 * (16 + 2 * 2 + 1)  # turns: a closed loop, two samples of each task alone, part of the run
    body = bodies[-1]
    assert body["stream"]
    assert body["return_token_ids"]
    assert body["max_completion_tokens"] == 9
    assert tuple(body["messages"]) in [sample.messages for sample in SAMPLES[body["emoe"]["task"]]]
    assert body["emoe"]["slo"]["latency_ms"] > body["emoe"]["slo"]["ttft_ms"] > 0
    assert bodies[0]["emoe"]["slo"] == {"ttft_ms": None, "latency_ms": None}


@pytest.mark.parametrize(
    ("fail", "after", "message"),
    [
        ("start", 0, "the server ended with status 1: error: no such model"),
        ("rest", 0, "what was left of the start failed: OSError: no such chore"),
        ("refuse", 0, "the server refused a request with 503: the queue is full"),
        ("refuse", 30, "the server refused a request with 503: the queue is full"),
        ("break", 20, "a request failed: peer closed connection"),
        ("error", 3, "an answer broke off: the step failed"),
        ("empty", 3, "an answer had no tokens"),
    ],
)
def test_a_failure_ends_the_run_in_one_line(
    fail: str, after: int, message: str, log: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--requests", "20", "--rates", "0.5", "--concurrency", "3", "--policy", "slo"]
    assert main([*options, "--server-args", "--fail", fail, "--after", str(after)]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert_none_is_left(log)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "http://127.0.0.1:1"], "http://127.0.0.1:1 has no /v1/emoe/state"),
        (["--url", "nonsense"], "has no /v1/emoe/state: Request URL is missing"),
        (["--trace", "some.csv"], "--trace has no prompts to send; replay it with --simulate"),
        (["--compare-residency", "lots"], "expert memory 'lots' is not an amount"),
    ],
)
def test_what_cannot_be_measured_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main([*options, "--requests", "4"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_sigterm_ends_the_server_too(log: Path):
    code = f"""
import time, benchmarks.serving.server as server
server.MODULE = {FAKE!r}
with server.started_server([]):
    print("ready", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert_none_is_left(log)


def test_a_server_that_ignores_sigterm_is_killed(log: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    module = tmp_path / "stubborn.py"
    module.write_text(
        "import signal\nfrom tests.benchmarks import fake_server\n"
        "on, fake_server.signal.signal = signal.signal, lambda *_: None\n"
        "on(signal.SIGTERM, signal.SIG_IGN)\nfake_server.main()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("benchmarks.serving.server.MODULE", "stubborn")
    monkeypatch.setattr("benchmarks.serving.server.STOP_SECONDS", 0.3)
    began = time.monotonic()
    with started_server([]):
        pass
    assert time.monotonic() - began < 30
    assert_none_is_left(log)


def test_residencies_are_compared_on_equal_memory(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    options = [
        "--requests",
        "12",
        "--rates",
        "0.5",
        "0.6",
        "--max-tokens",
        "56",
        "--full-batch",
        "2",
        "--turns",
        "1",
        "--json",
        str(out),
    ]
    assert main(["--compare-residency", "40%", *options, "--server-args", "--seed", "3"]) == 0
    report = json.loads(out.read_text())
    found = batches(full=2)  # the longest prompt has 200 tokens
    assert report["batches"] == dataclasses.asdict(found)
    assert report["max_batch_ratio"] == found.partial / 2
    full, partial = (arguments for _, arguments in started(log))
    for arguments, batch, share, policy in ((full, 2, "100%", "fcfs"), (partial, found.partial, "40%", "slo")):
        arguments.remove("--no-prefix-caching")
        named = dict(zip(arguments[::2], arguments[1::2], strict=True))
        assert named["--max-num-seqs"] == str(batch)
        assert (named["--expert-memory"], named["--scheduling-policy"]) == (share, policy)
        assert (named["--max-model-len"], named["--dtype"], named["--seed"]) == ("256", "float32", "3")
    runs, saturated = report["runs"], report["saturated"]
    assert [run["policy"] for run in runs] == 2 * ["100% resident", "40% resident"]
    assert [run["rate_fraction"] for run in runs] == [0.5, 0.5, 0.6, 0.6]
    latencies = [run["mean_latency_s"] for run in runs]
    of_one_turn = {"low": None, "high": None}
    for rate, ratio in (("0.5", latencies[1] / latencies[0]), ("0.6", latencies[3] / latencies[2])):
        assert report["mean_latency_ratios"][rate] == pytest.approx({"mean": ratio, **of_one_turn})
    for name, key in (("throughput_ratio", "throughput_tok_s"), ("requests_ratio", "throughput_rps")):
        ratio = saturated["40% resident"][key] / saturated["100% resident"][key]
        assert report[name] == pytest.approx({"mean": ratio, **of_one_turn})
    assert_none_is_left(log)
    printed = capsys.readouterr().out
    assert "max batch ratio" in printed
    assert "at 60%" in printed


def test_fixed_lengths_are_those_of_the_reference_answers(log: Path, tmp_path: Path):
    out = tmp_path / "out.json"
    options = ["--requests", "40", "--rates", "0.5", "--policy", "fcfs", "--concurrency", "3", "--json", str(out)]
    tokens = []
    for lengths in ([], ["--fixed-lengths"]):
        assert main([*options, *lengths]) == 0
        (run,) = json.loads(out.read_text())["runs"]
        tokens.append(run["throughput_tok_s"] / run["throughput_rps"])
    samples = [sample.output_tokens for rows in SAMPLES.values() for sample in rows]
    assert tokens[0] < 6.01  # as long as the server likes
    assert tokens[1] == pytest.approx(sum(samples) / len(samples), rel=0.5)
    assert tokens[1] > 9


def test_some_requests_name_another_task_and_keep_their_deadlines():
    load = Traffic(SAMPLES, requests=200, turns=1)
    slos = {"short": SLO(ttft_ms=1), "long": SLO(ttft_ms=2)}
    right = load.arriving(1.0, slos, 0)
    for share, low, high in ((0.0, 0, 0), (0.3, 35, 85), (1.0, 200, 200)):
        jobs = dataclasses.replace(load, misnamed=share).arriving(1.0, slos, 0)
        assert low <= sum(a.task != b.task for a, b in zip(jobs, right, strict=True)) <= high
        assert [dataclasses.replace(a, task=b.task) for a, b in zip(jobs, right, strict=True)] == right


def batches(**changes: Any) -> Batches:
    options = {"dtype": "float32", "share": "40%", "max_model_len": 256, "full": 4} | changes
    return Batches.of(config_from_directory(DEMO_MODEL), **options)


def test_batches_of_equal_memory():
    """Experts that are not resident make room for pages: 10 of 16 experts of 8 layers, 196,608 bytes each."""
    config = config_from_directory(DEMO_MODEL)
    found = batches()
    freed = 8 * 10 * 196_608
    assert found.partial == 4 + freed // (16 * page_bytes(config, "float32"))
    assert batches(share="100%").partial == 4
    assert batches(share="100%", full=1).partial == 1
    assert batches(full=8).partial == found.partial + 4
    assert batches(full=8).device_bytes > found.device_bytes
    assert batches(max_model_len=512).partial < found.partial
