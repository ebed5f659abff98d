"""Runs against real servers: what they can do, what deadlines are fair, then arrivals at shares of that."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.misnamed import misnamed
from benchmarks.serving.arrivals import poisson
from benchmarks.serving.client import Target, closed_loop, connected, open_loop
from benchmarks.serving.report import Record, summary
from benchmarks.serving.server import started_server
from benchmarks.serving.workload import Job, Samples, drawn
from emoe_jax.requests.request import SLO
from emoe_jax.scheduling.registry import VARIANTS

IDLE_REQUESTS = 5
"""Requests of each task that tell how long it takes on an idle server."""

NO_SLO = SLO()
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What is sent: Poisson arrivals at `fractions` of what the servers, of batches up to `concurrency`, can do.

    Deadlines are `slo_scale` times what the median request of a task takes on the idle server. A run has `turns`: in
    each, capacity (in a closed loop of `users`) and deadlines are measured, then every server gets the same part of the
    run. So a machine whose speed changes changes it for all of them, and what is asked of them changes with it.
    """

    samples: Samples
    fractions: Sequence[float] = (0.7, 0.95)
    requests: int = 2000
    concurrency: int = 16
    slo_scale: float = 5.0
    max_tokens: int = 128
    seed: int = 0
    turns: int = 8
    fixed_lengths: bool = False
    """Whether every answer has as many tokens as the reference answer to its prompt. Missing experts change when a
    model ends its answers, so that servers with other experts are asked for other work."""
    asked: int = 4
    """How often a user of a closed loop asks. Before all have asked and once the first is done, fewer requests run than
    could: the larger a batch is, the more of a short loop that is."""
    misnamed: float = 0.0
    """Share of the requests of a run that name another task than their own."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(sample.prompt_tokens for rows in self.samples.values() for sample in rows) + self.max_tokens

    @property
    def users(self) -> int:
        """Of a closed loop: twice what a server can run, so that somebody always waits."""
        return 2 * self.concurrency

    @property
    def queued(self) -> int:
        """How many may have to wait at once."""
        return max(self.requests, 2 * self.users)

    def saturating(self, turn: int) -> list[Job]:
        """Jobs of one turn for a closed loop: some for every user, and of all turns together a quarter of a run's."""
        count = max(self.requests // (4 * self.turns), self.asked * self.users)
        jobs = drawn([0.0] * count, self.samples, dict.fromkeys(self.samples, NO_SLO), self._seed(turn) + 1)
        return [self.sized(job) for job in jobs]

    def sized(self, job: Job) -> Job:
        """The job with the length that its answer is to have."""
        return dataclasses.replace(job, answer_tokens=job.sample.output_tokens) if self.fixed_lengths else job

    def arriving(self, rate: float, slos: Mapping[str, SLO], turn: int) -> list[Job]:
        """The jobs of one part of a run; the same for every server."""
        count = self.requests * (turn + 1) // self.turns - self.requests * turn // self.turns
        jobs = drawn(poisson(rate, count, self._seed(turn)), self.samples, slos, self._seed(turn))
        names = misnamed([job.task for job in jobs], self.misnamed, self._seed(turn))
        return [self.sized(dataclasses.replace(job, task=name)) for job, name in zip(jobs, names, strict=True)]

    def _seed(self, turn: int) -> int:
        """Apart from those of other turns and seeds."""
        return 1000 * self.seed + 2 * turn


@contextlib.contextmanager
def servers_of(policies: Sequence[str], arguments: Sequence[str], load: Traffic, report: Report) -> Iterator[list[str]]:
    """URLs of one server per policy, all alive at once so that their runs can take turns."""
    fixed = ["--max-num-seqs", str(load.concurrency), "--max-num-queued-reqs", str(load.queued)]
    with contextlib.ExitStack() as stack:
        urls = []
        for policy in policies:
            report(f"starting a server, {policy}")
            urls.append(stack.enter_context(started_server([*fixed, "--scheduling-policy", policy, *arguments])))
        yield urls


def run_live(urls: Sequence[str], load: Traffic, report: Report) -> dict[str, Any]:
    """`capacity_rps`, `slos` and `runs`: one summary per rate and server, in the order given. Raises `ServerFailed`."""
    return asyncio.run(_run(urls, load, report))


async def _run(urls: Sequence[str], load: Traffic, report: Report) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(url, load.max_tokens)) for url in urls]
        names = [(await client.state())["scheduler"]["policy"] for client in clients]
        return await measure(dict(zip(names, clients, strict=True)), load, report)


async def measure(clients: Mapping[str, Target], load: Traffic, report: Report) -> dict[str, Any]:
    """As `run_live`, with clients by the policies of what they send to. The capacity is the mean of the policies that
    lack no part.
    """
    yardsticks = [name for name in clients if name not in VARIANTS] or list(clients)
    runs, turns = [], []
    for fraction in load.fractions:
        run = await in_turns(clients, load, fraction, yardsticks, report)
        turns += run.turns
        runs += run.summaries()
    each = {name: float(np.mean([turn.capacities[name] for turn in turns])) for name in yardsticks}
    return {
        "capacity_rps": float(np.mean(list(each.values()))),
        "capacity_rps_each": each,
        "slos": {
            task: {
                key: float(np.mean([getattr(turn.slos[task], key) for turn in turns]))
                for key in ("ttft_ms", "latency_ms")
            }
            for task in load.samples
        },
        "runs": runs,
    }


@dataclasses.dataclass(frozen=True)
class Turn:
    """What servers could do in one part of a run: requests/s of each, and fair deadlines per task."""

    capacities: Mapping[str, float]
    slos: Mapping[str, SLO]

    @property
    def capacity(self) -> float:
        return float(np.mean(list(self.capacities.values())))


@dataclasses.dataclass
class Run:
    """Records of each server at a share of the capacity. The parts of a run are put end to end."""

    fraction: float
    parts: dict[str, list[list[Record]]]
    """Of each server, by turn."""
    turns: list[Turn]

    def mean_latencies(self, name: str) -> list[float]:
        """Of a server, by turn, in seconds."""
        return [float(np.mean([record.latency for record in part])) for part in self.parts[name]]

    def summaries(self) -> list[dict[str, Any]]:
        """One per server, in their order."""
        capacity = float(np.mean([turn.capacity for turn in self.turns]))
        rates = {"rate_fraction": self.fraction, "capacity_rps": capacity, "rate_rps": self.fraction * capacity}
        return [{"policy": name, **rates, **summary(end_to_end(parts))} for name, parts in self.parts.items()]


async def in_turns(
    clients: Mapping[str, Target], load: Traffic, fraction: float, yardsticks: Sequence[str], report: Report
) -> Run:
    """A run against each server, by its name, at a share of what the `yardsticks` among them can do on average."""
    run = Run(fraction, {name: [] for name in clients}, [])
    for number in range(load.turns):
        closed = {name: await closed_loop(clients[name], load.saturating(number), load.users) for name in yardsticks}
        capacities = {name: summary(records)["throughput_rps"] for name, records in closed.items()}
        turn = Turn(capacities, await idle_slos(clients[yardsticks[0]], load))
        run.turns.append(turn)
        jobs = load.arriving(fraction * turn.capacity, turn.slos, number)
        first = (load.seed + number) % len(clients)
        names = list(clients)
        for name in names[first:] + names[:first]:  # the later one comes, the older is what was measured for it
            if jobs:
                report(f"{name}: {len(jobs)} requests at {fraction:g} of {turn.capacity:.2f} requests/s")
                run.parts[name].append(await open_loop(clients[name], jobs))
    return run


def end_to_end(parts: Sequence[Sequence[Record]]) -> list[Record]:
    """Records of one run, of which each part begins when the one before it ends."""
    records: list[Record] = []
    for part in parts:
        begin = max((record.end for record in records), default=0.0)
        records += [record.later(begin) for record in part]
    return records


async def idle_slos(client: Target, load: Traffic) -> dict[str, SLO]:
    """Deadlines per task, from requests that have the server to themselves."""
    slos = {}
    for task, rows in load.samples.items():
        jobs = [load.sized(Job(0.0, task, sample, NO_SLO)) for sample in rows[:IDLE_REQUESTS]]
        records = await closed_loop(client, jobs, 1)
        ttft, latency = (
            1e3 * load.slo_scale * float(np.median([getattr(record, name) for record in records]))
            for name in ("ttft", "latency")
        )
        slos[task] = SLO(ttft_ms=ttft, latency_ms=latency)
    return slos
