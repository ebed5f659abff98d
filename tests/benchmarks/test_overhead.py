"""The overhead benchmark on a tiny model and few streams: that it measures, not how much."""

from pathlib import Path

from benchmarks.overhead.http import http_overhead
from benchmarks.overhead.scheduling import scheduler_overhead
from benchmarks.overhead.steps import host_overhead
from tests.serve.checkpoint import write_tiny_checkpoint


def test_host_work_of_a_step(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "tiny")
    numbers = host_overhead(tmp_path / "tiny", batch=3, steps=8)
    assert 0 < numbers["host_ms_per_step"] <= numbers["host_ms_per_step_p99"]
    assert numbers["host_cpu_ms_per_step"] > 0


def test_http_work_of_a_token() -> None:
    numbers = http_overhead(streams=4, tokens=5, period=0.02)
    assert numbers["tokens"] == 20
    assert 0 < numbers["http_delay_ms_median"] <= numbers["http_delay_ms_p99"]
    assert numbers["http_cpu_ms_per_token"] >= 0


def test_work_of_the_scheduler() -> None:
    numbers = scheduler_overhead(requests=50)
    assert set(numbers) == {"slo_seconds_for_50_requests", "fcfs_seconds_for_50_requests"}
    assert min(numbers.values()) > 0
