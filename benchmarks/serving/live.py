"""Runs against real servers: what they can do, what deadlines are fair, then arrivals at shares of that."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.serving.arrivals import poisson
from benchmarks.serving.client import Client, closed_loop, connected, open_loop
from benchmarks.serving.report import Record, summary
from benchmarks.serving.server import started_server
from benchmarks.serving.workload import Job, Samples, drawn
from emoe_jax.engine.request import SLO

IDLE_REQUESTS = 5
"""Requests of each task that tell how long it takes on an idle server."""

NO_SLO = SLO()
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Load:
    """What is sent: Poisson arrivals at `fractions` of the capacity that `concurrency` users reach in a closed loop.

    Deadlines are `slo_scale` times what the median request of a task takes on the idle server.
    """

    samples: Samples
    fractions: Sequence[float] = (0.7, 0.95)
    requests: int = 2000
    concurrency: int = 16
    slo_scale: float = 5.0
    max_tokens: int = 128
    seed: int = 0
    turns: int = 4
    """Parts of a run, between which servers take turns, so that a machine that slows down slows all of them."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(sample.prompt_tokens for rows in self.samples.values() for sample in rows) + self.max_tokens

    @property
    def queued(self) -> int:
        """How many may have to wait at once."""
        return max(self.requests, 4 * self.concurrency)

    def saturated(self) -> list[Job]:
        """Jobs for a closed loop: a quarter of a run's, and some for every user."""
        count = max(self.requests // 4, 4 * self.concurrency)
        return drawn([0.0] * count, self.samples, dict.fromkeys(self.samples, NO_SLO), self.seed + 1)

    def arriving(self, rate: float, slos: Mapping[str, SLO], turn: int) -> list[Job]:
        """The jobs of one part of a run; the same for every server."""
        count = self.requests * (turn + 1) // self.turns - self.requests * turn // self.turns
        return drawn(poisson(rate, count, self.seed + turn), self.samples, slos, self.seed + turn)


@contextlib.contextmanager
def servers_of(policies: Sequence[str], arguments: Sequence[str], load: Load, report: Report) -> Iterator[list[str]]:
    """URLs of one server per policy, all alive at once so that their runs can take turns."""
    fixed = ["--max-num-seqs", str(load.concurrency), "--max-num-queued-reqs", str(load.queued)]
    with contextlib.ExitStack() as stack:
        urls = []
        for policy in policies:
            report(f"starting a server, {policy}")
            urls.append(stack.enter_context(started_server([*fixed, "--scheduling-policy", policy, *arguments])))
        yield urls


def run_live(urls: Sequence[str], load: Load, report: Report) -> dict[str, Any]:
    """`capacity_rps`, `slos` and `runs`: one summary per rate and server, in the order given. Raises `ServerFailed`."""
    return asyncio.run(_run(urls, load, report))


async def _run(urls: Sequence[str], load: Load, report: Report) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(url, load.max_tokens)) for url in urls]
        names = [(await client.state())["scheduler"]["policy"] for client in clients]
        capacities = []
        for name, client in zip(names, clients, strict=True):
            report(f"{name}: a closed loop of {load.concurrency} users")
            records = await closed_loop(client, load.saturated(), load.concurrency)
            capacities.append(summary(records)["throughput_rps"])
        capacity = float(np.mean(capacities))
        slos = await idle_slos(clients[0], load)
        runs = []
        for fraction in load.fractions:
            rate = fraction * capacity
            measured = await in_turns(dict(zip(names, clients, strict=True)), load, rate, slos, report)
            for name, records in measured.items():
                runs.append({"policy": name, "rate_fraction": fraction, "rate_rps": rate, **summary(records)})
    return {
        "capacity_rps": capacity,
        "capacity_rps_each": dict(zip(names, capacities, strict=True)),
        "slos": {task: {"ttft_ms": slo.ttft_ms, "latency_ms": slo.latency_ms} for task, slo in slos.items()},
        "runs": runs,
    }


async def in_turns(
    clients: Mapping[str, Client], load: Load, rate: float, slos: Mapping[str, SLO], report: Report
) -> dict[str, list[Record]]:
    """A run at `rate` requests/s against each server, by its name. The parts of a run are put end to end."""
    measured: dict[str, list[Record]] = {name: [] for name in clients}
    for turn in range(load.turns):
        jobs = load.arriving(rate, slos, turn)
        for name, client in clients.items():
            if jobs:
                report(f"{name}: {len(jobs)} requests at {rate:.2f} requests/s")
                records = await open_loop(client, jobs)
                begin = max((record.end for record in measured[name]), default=0.0)
                measured[name] += [record.later(begin) for record in records]
    return measured


async def idle_slos(client: Client, load: Load) -> dict[str, SLO]:
    """Deadlines per task, from requests that have the server to themselves."""
    slos = {}
    for task, rows in load.samples.items():
        jobs = [Job(0.0, task, sample, NO_SLO) for sample in rows[:IDLE_REQUESTS]]
        records = await closed_loop(client, jobs, 1)
        ttft, latency = (
            1e3 * load.slo_scale * float(np.median([getattr(record, name) for record in records]))
            for name in ("ttft", "latency")
        )
        slos[task] = SLO(ttft_ms=ttft, latency_ms=latency)
    return slos
