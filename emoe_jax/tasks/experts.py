"""Which experts a task needs, as far as its profile knows."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from emoe_jax.tasks.profile import TaskProfile
from emoe_jax.traces.coverage import best_experts

TaskName = str | None


class TaskExperts:
    """The hot experts of each task: in layer `m` the `capacities[m]` most frequent ones of its profile.

    A task without a measured routing has none.
    """

    def __init__(self, profile: TaskProfile | None, capacities: Sequence[int]):
        self._hot: dict[TaskName, Bool[np.ndarray, "M E"]] = {}
        self._sensitive: dict[TaskName, Bool[np.ndarray, "M E"]] = {}  # the hot ones of layers that are not insensitive
        self._unwished: dict[TaskName, Float[np.ndarray, "M E"]] = {}  # log probability that a token does not choose it
        for name, task in () if profile is None else profile.tasks.items():
            if profile is not None and task.routing is not None:
                self._hot[name] = best_experts(task.routing, capacities)
                self._sensitive[name] = self._hot[name] & (profile.sensitivity(name) > 0)[:, None]
                self._unwished[name] = _log_unwished(profile.top_k * task.routing)
        self._others: Float[np.ndarray, "M E"] | None = None  # the same of a task that is not known
        if profile is not None and self._hot:
            self._others = _log_unwished(profile.top_k * profile.frequency(None))

    def missing(self, task: TaskName, resident: Bool[np.ndarray, "M E"], sensitive: bool = False) -> int:
        """How many of its hot experts are not resident; `sensitive`: in layers where it matters which serve it."""
        hot = (self._sensitive if sensitive else self._hot).get(task)
        return 0 if hot is None else int((hot & ~resident).sum())

    def wanted(self, task: TaskName, tokens: int, resident: Bool[np.ndarray, "M E"]) -> float:
        """How many absent experts so many tokens are expected to choose, all layers together.

        Worked example, one layer: 2 tokens that each choose an absent expert with probability 0.5 choose it with
        0.75, so it counts 0.75. A task that is not known counts as the mean of those that are.
        """
        unwished = self._unwished.get(task, self._others)
        return 0.0 if unwished is None else float(-np.expm1(tokens * unwished[~resident]).sum())


def _log_unwished(chosen: Float[np.ndarray, "M E"]) -> Float[np.ndarray, "M E"]:
    return np.log1p(-np.minimum(chosen, 1 - 1e-9))
