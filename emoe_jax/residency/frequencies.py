"""How often each task's prompts used each expert lately: what every prediction must beat."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from emoe_jax.tasks import OTHER, TaskProfile

HALF_LIFE = 16.0
"""Prompts of a task after which an earlier one counts half."""


class TaskFrequencies:
    """Decayed mean routing per task, begun at the profile's."""

    def __init__(self, profile: TaskProfile):
        self._profile = profile
        self._shares: dict[str, Float[np.ndarray, "M E"]] = {}

    def of(self, task: str) -> Float[np.ndarray, "M E"]:
        """Expected share of each expert; each layer sums to 1."""
        return self._shares[task] if task in self._shares else self._profile.frequency(task)

    @property
    def tasks(self) -> list[str]:
        """The profile's tasks, `other`, and those that prompts were observed of besides."""
        return list(dict.fromkeys([*self._profile.tasks, OTHER, *self._shares]))

    def observe(self, task: str, counts: Int[np.ndarray, "M E"]) -> None:
        """A prompt of the task was routed like this, at least one token of it."""
        shares = counts / counts.sum(axis=1, keepdims=True)
        kept = 0.5 ** (1 / HALF_LIFE)
        self._shares[task] = kept * self.of(task) + (1 - kept) * shares
