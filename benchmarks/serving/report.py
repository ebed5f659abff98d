"""What a run of requests looked like from outside."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.serving.workload import Job

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished request, in seconds since the run's start; one time per token.

    When it `started`, and whether its deadlines were given up as `unattainable`, cannot be seen from outside a server.
    """

    job: Job
    token_times: tuple[float, ...]
    started: float | None = None
    unattainable: bool | None = None

    @property
    def end(self) -> float:
        return self.token_times[-1]

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.job.arrival

    @property
    def latency(self) -> float:
        return self.end - self.job.arrival

    @property
    def wait(self) -> float | None:
        return None if self.started is None else self.started - self.job.arrival

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; None for an answer of one token."""
        count = len(self.token_times) - 1
        return (self.end - self.token_times[0]) / count if count else None

    def later(self, seconds: float) -> "Record":
        """The same request in a run that began so much earlier."""
        return Record(
            dataclasses.replace(self.job, arrival=self.job.arrival + seconds),
            tuple(time + seconds for time in self.token_times),
            None if self.started is None else self.started + seconds,
            self.unattainable,
        )

    @cached_property
    def attained(self) -> bool:
        slo = self.job.slo
        return (slo.ttft_ms is None or self.ttft <= slo.ttft_ms / 1e3) and (
            slo.latency_ms is None or self.latency <= slo.latency_ms / 1e3
        )


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """The numbers of one run; times in seconds, rates per second of the time from first arrival to last token."""
    seconds = max(record.end for record in records) - min(record.job.arrival for record in records)
    tokens = sum(len(record.token_times) for record in records)
    gaps = np.concatenate([np.diff(record.token_times) for record in records])
    tasks = sorted({record.job.task for record in records})
    return {
        "requests": len(records),
        "slo_attainment": _share(records),
        "slo_attainment_per_task": {
            task: _share([record for record in records if record.job.task == task]) for task in tasks
        },
        "mean_latency_s": float(np.mean([record.latency for record in records])),
        "goodput_rps": sum(record.attained for record in records) / seconds,
        "throughput_rps": len(records) / seconds,
        "throughput_tok_s": tokens / seconds,
        "max_wait_s": max((record.wait for record in records if record.wait is not None), default=None),
        "unattainable": _count(record.unattainable for record in records),
        **_percentiles("ttft", [record.ttft for record in records]),
        **_percentiles("tpot", [record.tpot for record in records if record.tpot is not None]),
        **_percentiles("itl", gaps),
        **_percentiles("latency", [record.latency for record in records]),
    }


def _count(flags: Iterable[bool | None]) -> int | None:
    known = [flag for flag in flags if flag is not None]
    return sum(known) if known else None


def _share(records: Sequence[Record]) -> float:
    return sum(record.attained for record in records) / len(records)


def _percentiles(name: str, values: Any) -> dict[str, float | None]:
    found = np.percentile(values, PERCENTILES).tolist() if len(values) else [None] * len(PERCENTILES)
    return {f"p{percentile}_{name}_s": value for percentile, value in zip(PERCENTILES, found, strict=True)}
