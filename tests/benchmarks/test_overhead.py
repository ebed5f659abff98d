"""The overhead benchmark on a tiny model and few streams: that it measures, not how much."""

import time
from pathlib import Path

import pytest

from benchmarks.overhead.__main__ import main
from benchmarks.overhead.arguments import COUNTS, argument_overhead
from benchmarks.overhead.growth import Size, Stopwatch, growth, sizes_up_to
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


def test_growth_of_a_model() -> None:
    numbers = growth(Size(1, 8), batch=1, steps=4, max_num_batched_tokens=32, expert_memory="100%")
    assert numbers["warm_up_seconds"] > 0
    assert numbers["thread_ms"] > 0
    assert numbers["step_ms"] > 0
    assert {"call executables", "read results", "follow wishes"} <= numbers["parts"].keys()
    assert list(numbers["parts"].values()) == sorted(numbers["parts"].values(), reverse=True)


def test_sizes_of_the_curve() -> None:
    assert sizes_up_to(48, 128) == [(12, 32), (24, 64), (48, 128)]
    assert sizes_up_to(2, 8) == [(1, 8), (2, 8)]
    assert sizes_up_to(1, 8) == [(1, 8)]


@pytest.mark.parametrize("arguments", [["--layers", "4"], ["--experts", "16"], ["--layers", "4", "--experts", "7"]])
def test_growth_needs_both_sizes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--experts" in capsys.readouterr().err


def test_a_part_is_without_the_parts_within_it() -> None:
    watch = Stopwatch()
    with watch.part("outer"), watch.part("inner"):
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
    assert watch.seconds["inner"] >= 0.02
    assert watch.seconds["outer"] < 0.01


def test_arguments_and_stacked_layers_are_timed() -> None:
    numbers = argument_overhead(repetitions=3)
    few, many = (numbers[f"dispatch_ms_of_{count}_arguments"] for count in COUNTS)
    assert 0 < few < many
    assert min(numbers["sliced_layers_ratio"], numbers["scanned_layers_ratio"]) > 0
