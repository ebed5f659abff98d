"""Simulated runs of several replicas: routings over one traffic."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.serving.arrivals import poisson
from benchmarks.serving.fleet import Fleet
from benchmarks.serving.simulate import SimulatedEngine
from benchmarks.serving.simulated import SATURATED, Machine, make_policy
from benchmarks.serving.workload import Job, Samples, demo_samples
from emoe_jax.requests.request import SLO
from emoe_jax.scheduling.replicas import make_routing

HOT = 0.6
"""Share of the requests that are of the hot task. The others share the rest equally."""
SHIFT_SECONDS = 2.0
"""After so long, another task is the hot one in `shifting` traffic."""
TRAFFICS = ("mixed", "skewed", "shifting")


def hot_task(traffic: str, tasks: Sequence[str], arrival: float) -> str | None:
    """The task that most requests are of at that time; None in `mixed` traffic, where all tasks are equal."""
    if traffic == "mixed":
        return None
    return tasks[int(arrival / SHIFT_SECONDS) % len(tasks)] if traffic == "shifting" else tasks[0]


def draw(arrivals: Sequence[float], samples: Samples, slos: Mapping[str, SLO], traffic: str, seed: int) -> list[Job]:
    """A job per arrival: its task as the traffic says, then one of the task's samples."""
    rng = np.random.default_rng(seed)
    tasks = sorted(samples)
    jobs = []
    for arrival in arrivals:
        hot = hot_task(traffic, tasks, arrival)
        chances = [1.0 if hot is None else HOT if task == hot else (1 - HOT) / (len(tasks) - 1) for task in tasks]
        task = tasks[int(rng.choice(len(tasks), p=np.array(chances) / sum(chances)))]
        rows = samples[task]
        jobs.append(Job(arrival, task, rows[int(rng.integers(len(rows)))], slos[task]))
    return jobs


def run_replicas(
    machine: Machine,
    count: int,
    *,
    traffics: Sequence[str],
    routings: Sequence[str],
    thresholds: Sequence[int],
    policy: str,
    requests: int,
    fractions: Sequence[float],
    seeds: Sequence[int],
    slo_scale: float,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """One summary per traffic, seed, rate, routing and threshold. Rates are shares of what `count` machines can do with
    the traffic, and `requests` are of all of them. A routing without a threshold is run once.
    """
    for name, threshold in (ways := _ways(routings, thresholds)):
        make_routing(name, threshold or 0)  # a mistake shows before anything is computed
    samples: Samples = demo_samples()
    slos = machine.slos(samples, slo_scale)
    runs = []
    for traffic in traffics:
        # As many moments as a run has: `shifting` traffic has each task as the hot one.
        moments = np.linspace(0, SHIFT_SECONDS * len(samples), SATURATED, endpoint=False).tolist()
        limit = count * machine.capacity(draw(moments, samples, slos, traffic, seeds[0] + 1))
        for seed in seeds:
            for fraction in fractions:
                jobs = draw(poisson(fraction * limit, requests, seed), samples, slos, traffic, seed)
                for name, threshold in ways:
                    progress(f"{count} replicas, {traffic}, {fraction:.0%}, {name}")
                    fleet = Fleet(_engines(machine, count, policy, seed), make_routing(name, threshold or 0), seed)
                    runs.append(
                        {
                            **machine.setting._asdict(),
                            "replicas": count,
                            "traffic": traffic,
                            "replica_routing": name,
                            "threshold": threshold,
                            "policy": policy,
                            "seed": seed,
                            "rate_fraction": fraction,
                            "rate_rps": fraction * limit,
                            **fleet.run(jobs),
                        }
                    )
    return runs


def _ways(routings: Sequence[str], thresholds: Sequence[int]) -> list[tuple[str, int | None]]:
    """Routings with their thresholds; None for a routing that has none."""
    return [
        (name, threshold) for name in routings for threshold in (thresholds if name.endswith("-affine") else [None])
    ]


def _engines(machine: Machine, count: int, policy: str, seed: int) -> list[SimulatedEngine]:
    engines = []
    for index in range(count):
        own = seed * 100_003 + index
        experts = machine.experts(own)
        engines.append(
            SimulatedEngine(
                machine.device,
                make_policy(policy, machine.device, experts),
                own,
                experts=experts,
                prefix_caching=True,
            )
        )
    return engines
