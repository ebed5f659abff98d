"""What answers lost to substitution, per task."""

import dataclasses
from collections.abc import Sequence as Rows
from typing import Any

from emoe_jax.requests.sequence import Sequence
from emoe_jax.tasks import OTHER

MOST_TASKS = 64
"""Clients may name tasks of their own; what comes beyond so many is booked as `other`."""


@dataclasses.dataclass
class _Account:
    requests: int = 0
    assigned: int = 0
    substituted: int = 0
    substituted_weight: float = 0.0


class TaskAccounts:
    """Totals over ended requests since the engine was loaded."""

    def __init__(self, top_k: int):
        self._top_k = top_k
        self._by_task: dict[str, _Account] = {}

    def add(self, sequences: Rows[Sequence]) -> None:
        """Book a request that ended."""
        task = sequences[0].task or "unclassified"
        if task not in self._by_task and len(self._by_task) >= MOST_TASKS:
            task = OTHER
        account = self._by_task.setdefault(task, _Account())
        account.requests += 1
        account.assigned += sum(sequence.assigned for sequence in sequences)
        account.substituted += sum(sequence.substituted for sequence in sequences)
        account.substituted_weight += sum(sequence.substituted_weight for sequence in sequences)

    def state(self) -> dict[str, Any]:
        """Per task: requests, and the shares of assignments and of router weight that were substituted."""
        return {
            task: {
                "requests": account.requests,
                "substituted": round(account.substituted / max(1, account.assigned), 6),
                "substituted_weight": round(account.substituted_weight * self._top_k / max(1, account.assigned), 6),
            }
            for task, account in sorted(self._by_task.items())
        }
