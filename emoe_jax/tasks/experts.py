"""Which experts a task needs, as far as its profile knows."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from emoe_jax.tasks.profile import TaskProfile

Task = str | None


class TaskExperts:
    """The hot experts of each task: in layer `m` the `capacities[m]` most frequent ones of its profile.

    A task without a measured routing has none, and shares none.
    """

    def __init__(self, profile: TaskProfile | None, capacities: Sequence[int]):
        self._hot: dict[Task, Bool[np.ndarray, "M E"]] = {}
        for name, task in () if profile is None else profile.tasks.items():
            if task.routing is not None:
                ranks = np.argsort(np.argsort(-task.routing, axis=1, kind="stable"), axis=1)
                self._hot[name] = ranks < np.array(capacities)[:, None]
        self._affinity = {
            (one, other): float((ours & theirs).sum() / ours.sum())
            for one, ours in self._hot.items()
            for other, theirs in self._hot.items()
        }

    def affinity(self, one: Task, other: Task) -> float:
        """Share of the first task's hot experts that are also the second's, 0 to 1."""
        return self._affinity.get((one, other), 0.0)

    def missing(self, task: Task, resident: Bool[np.ndarray, "M E"]) -> int:
        """How many of its hot experts are not resident."""
        hot = self._hot.get(task)
        return 0 if hot is None else int((hot & ~resident).sum())
