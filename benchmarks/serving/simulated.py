"""Simulated runs: settings, policies, rates and seeds over one workload."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.arrivals import TraceRow, poisson, read_trace
from benchmarks.serving.devices import Device
from benchmarks.serving.experts import ModelExperts, SimulatedExperts
from benchmarks.serving.report import Record, summary
from benchmarks.serving.settings import Setting
from benchmarks.serving.simulate import capacity, simulate
from benchmarks.serving.workload import Job, Samples, demo_samples, drawn, replayed, task_slos, trace_samples
from emoe_jax.errors import ConfigError
from emoe_jax.requests.request import SLO
from emoe_jax.residency.admission import ExpertLoading
from emoe_jax.scheduling.policy import AdmissionPolicy
from emoe_jax.scheduling.registry import make_admission_policy

SATURATED = 1000
"""Requests with which the capacity is measured."""
IDLE_REQUESTS = 5
"""Requests of each task that tell how long it takes on an idle machine that waits for experts."""
IDLE_SECONDS = 30.0
"""Between two of them."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Jobs at any share of the machine's capacity (requests/s), drawn by a seed."""

    name: str
    capacity: float
    jobs: Callable[[float, int], list[Job]]


@dataclasses.dataclass(frozen=True)
class Machine:
    """A device and its experts; each run begins with the experts that an engine would start with."""

    device: Device
    setting: Setting
    model: ModelExperts | None = None

    def run(self, jobs: Sequence[Job], policy: str, seed: int = 0) -> list[Record]:
        experts = self.experts(seed)
        return simulate(jobs, self.device, make_policy(policy, self.device, experts), seed, experts=experts)

    def capacity(self, jobs: Sequence[Job]) -> float:
        """Requests/s, first come, first served."""
        experts = self.experts(0)
        return capacity(jobs, self.device, make_policy("fcfs", self.device, experts), experts)

    def slos(self, samples: Samples, scale: float) -> dict[str, SLO]:
        """Deadlines per task: `scale` times what a request takes on the idle machine. By the cost model alone where all
        experts are resident; else as measured, the median of some."""
        experts = self.experts(0)
        if experts is None or experts.is_full:
            return task_slos(samples, self.device.cost, scale)
        slos = {}
        for task, rows in samples.items():
            jobs = [Job(i * IDLE_SECONDS, task, sample, SLO()) for i, sample in enumerate(rows[:IDLE_REQUESTS])]
            records = self.run(jobs, "fcfs")
            ttft, latency = (
                1e3 * scale * float(np.median([getattr(record, name) for record in records]))
                for name in ("ttft", "latency")
            )
            slos[task] = SLO(ttft_ms=ttft, latency_ms=latency)
        return slos

    def experts(self, seed: int) -> SimulatedExperts | None:
        if self.model is None or self.device.experts is None:
            return None
        return SimulatedExperts(self.model, self.setting, self.device.experts, seed)


def machine_of(device: Device, setting: Setting, traced: bool) -> Machine:
    """The demo model's experts are known, and so is their routing in its five tasks; nothing is known of a trace's."""
    if setting.routing == "bounded":
        raise ConfigError("--simulate knows no router weights, by which `bounded` goes; measure it on a server")
    if device.experts is not None and not traced:
        return Machine(device, setting, ModelExperts.demo())
    if setting != Setting():
        raise ConfigError("--residency and --routing need the demo device and its five tasks, without --trace")
    return Machine(device, setting)


def poisson_workload(machine: Machine, count: int, seed: int, scale: float) -> Workload:
    """The demo model's five tasks, drawn uniformly, in a Poisson process. `seed` is the capacity's."""
    samples: Samples = demo_samples()
    slos = machine.slos(samples, scale)
    limit = machine.capacity(drawn([0.0] * SATURATED, samples, slos, seed + 1))
    return Workload(
        "five tasks, Poisson",
        limit,
        lambda fraction, seed: drawn(poisson(fraction * limit, count, seed), samples, slos, seed),
    )


def trace_workload(machine: Machine, paths: Sequence[str], seconds: float, scale: float) -> Workload:
    """The first `seconds` of recorded traces, one task per file, faster or slower by the same factor."""
    traces: Mapping[str, list[TraceRow]] = {
        Path(path).stem: [row for row in read_trace(path) if row.arrival < seconds] for path in paths
    }
    if len(traces) < len(paths):
        raise ConfigError("two traces have the same name; each must be a task of its own")
    slos = task_slos(trace_samples(traces), machine.device.cost, scale)
    recorded = replayed(traces, slos, 1.0)
    limit = machine.capacity(recorded)
    natural = len(recorded) / max(recorded[-1].arrival, 1e-9)
    names = ", ".join(traces)
    return Workload(names, limit, lambda fraction, _: replayed(traces, slos, fraction * limit / natural))


def run_simulated(
    workload: Workload, machine: Machine, policies: Sequence[str], fractions: Sequence[float], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """One summary per seed, rate and policy, in the order given."""
    runs = []
    for seed in seeds:
        for fraction in fractions:
            jobs = workload.jobs(fraction, seed)
            for name in policies:
                rates = {"rate_fraction": fraction, "capacity_rps": workload.capacity}
                rates["rate_rps"] = fraction * workload.capacity
                found = summary(machine.run(jobs, name, seed))
                runs.append({**machine.setting._asdict(), "seed": seed, "policy": name, **rates, **found})
    return runs


def make_policy(name: str, device: Device, experts: SimulatedExperts | None = None) -> AdmissionPolicy:
    """As an engine makes it, where experts are known; else a policy that knows of none."""
    if experts is not None:
        return make_admission_policy(name, device, experts.profile, ExpertLoading(experts.profile, experts).seconds)
    return make_admission_policy(name, device)
