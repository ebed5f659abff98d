"""Simulated runs: policies and rates over one workload."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.arrivals import TraceRow, poisson, read_trace
from benchmarks.serving.devices import Device
from benchmarks.serving.report import summary
from benchmarks.serving.simulate import capacity, simulate
from benchmarks.serving.workload import Job, Samples, demo_samples, drawn, replayed, task_slos, trace_samples
from emoe_jax.errors import ConfigError
from emoe_jax.scheduling.policy import AdmissionPolicy
from emoe_jax.scheduling.registry import make_admission_policy

SATURATED = 2000
"""Requests with which the capacity is measured."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Jobs at any share of the machine's capacity (requests/s)."""

    name: str
    capacity: float
    jobs: Callable[[float], list[Job]]


def poisson_workload(device: Device, count: int, seed: int, scale: float) -> Workload:
    """The demo model's five tasks, drawn uniformly, in a Poisson process."""
    samples: Samples = demo_samples()
    slos = task_slos(samples, device.cost, scale)
    saturated = drawn([0.0] * SATURATED, samples, slos, seed + 1)
    limit = capacity(saturated, device, lambda: make_policy("fcfs", device))
    return Workload(
        "five tasks, Poisson",
        limit,
        lambda fraction: drawn(poisson(fraction * limit, count, seed), samples, slos, seed),
    )


def trace_workload(device: Device, paths: Sequence[str], seconds: float, scale: float) -> Workload:
    """The first `seconds` of recorded traces, one task per file, faster or slower by the same factor."""
    traces: Mapping[str, list[TraceRow]] = {
        Path(path).stem: [row for row in read_trace(path) if row.arrival < seconds] for path in paths
    }
    if len(traces) < len(paths):
        raise ConfigError("two traces have the same name; each must be a task of its own")
    slos = task_slos(trace_samples(traces), device.cost, scale)
    recorded = replayed(traces, slos, 1.0)
    limit = capacity(recorded, device, lambda: make_policy("fcfs", device))
    natural = len(recorded) / max(recorded[-1].arrival, 1e-9)
    names = ", ".join(traces)
    return Workload(names, limit, lambda fraction: replayed(traces, slos, fraction * limit / natural))


def run_simulated(
    workload: Workload, device: Device, policies: Sequence[str], fractions: Sequence[float], seed: int
) -> list[dict[str, Any]]:
    """One summary per rate and policy, in the order given."""
    runs = []
    for fraction in fractions:
        for name in policies:
            records = simulate(workload.jobs(fraction), device, make_policy(name, device), seed)
            rate = fraction * workload.capacity
            runs.append({"policy": name, "rate_fraction": fraction, "rate_rps": rate, **summary(records)})
    return runs


def make_policy(name: str, device: Device) -> AdmissionPolicy:
    return make_admission_policy(
        name,
        max_num_seqs=device.max_num_seqs,
        max_model_len=device.max_model_len,
        prefill_chunk=device.max_num_batched_tokens,
    )
