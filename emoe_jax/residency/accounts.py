"""What answers lost to substitution, per task."""

import dataclasses
from collections.abc import Collection
from collections.abc import Sequence as Rows
from typing import Any

from emoe_jax.requests.sequence import Sequence, substituted_share
from emoe_jax.tasks import OTHER

UNCLASSIFIED = "unclassified"
"""The account of requests without a task."""

MOST_TASKS = 64
"""Clients may name tasks of their own; what comes beyond so many is booked as `other`."""


def account_of(task: str | None, accounts: Collection[str]) -> str:
    """The name that a request is booked under, beside those that there are."""
    name = task or UNCLASSIFIED
    return OTHER if name not in accounts and len(accounts) >= MOST_TASKS else name


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
        account = self._by_task.setdefault(account_of(sequences[0].task, self._by_task), _Account())
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
                "substituted_weight": round(
                    substituted_share(account.substituted_weight, account.assigned, self._top_k), 6
                ),
            }
            for task, account in sorted(self._by_task.items())
        }
