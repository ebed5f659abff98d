"""How many answers kept their deadlines, by task."""

import dataclasses
from typing import Any

from emoe_jax.requests.sequence import Sequence

MAX_TASKS = 64
"""Tasks that are counted apart; clients may make up names."""


@dataclasses.dataclass(slots=True)
class Counts:
    """Answers that ended, those of them that had a deadline, and those that kept all their deadlines."""

    ended: int = 0
    with_slo: int = 0
    attained: int = 0

    def state(self) -> dict[str, Any]:
        """The three counts and `attainment`, the share `attained / with_slo`. It is None without any deadline."""
        share = self.attained / self.with_slo if self.with_slo else None
        return dataclasses.asdict(self) | {"attainment": share}


class Attainment:
    """Counts since the scheduler was made."""

    def __init__(self) -> None:
        self.total = Counts()
        self._tasks: dict[str, Counts] = {}

    def record(self, sequence: Sequence, now: float) -> None:
        """A sequence came to its end at time `now` (seconds)."""
        counts = [self.total]
        if sequence.task is not None and (sequence.task in self._tasks or len(self._tasks) < MAX_TASKS):
            counts.append(self._tasks.setdefault(sequence.task, Counts()))
        slo = sequence.slo
        has_slo = slo.ttft_ms is not None or slo.latency_ms is not None
        for count in counts:
            count.ended += 1
            count.with_slo += has_slo
            count.attained += has_slo and attains(sequence, now)

    def state(self) -> dict[str, Any]:
        """Counts and shares, as JSON-able values."""
        return self.total.state() | {"tasks": {name: counts.state() for name, counts in self._tasks.items()}}


def attains(sequence: Sequence, ended: float) -> bool:
    """Whether a sequence that ended at `ended` (seconds) kept every deadline that it had."""
    slo = sequence.slo
    if slo.ttft_ms is not None and (
        sequence.first_token_at is None or sequence.first_token_at - sequence.arrival > slo.ttft_ms / 1e3
    ):
        return False
    return slo.latency_ms is None or ended - sequence.arrival <= slo.latency_ms / 1e3
