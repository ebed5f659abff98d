"""`Regret`: what other policies would have covered of the traffic that the residents of an engine have served."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from emoe_jax.policies.belady import next_use
from emoe_jax.policies.instant_exchange import exchange
from emoe_jax.policies.pace import Pace
from emoe_jax.policies.registry import POLICIES, PolicyWeights
from emoe_jax.policies.rule import ExpectedWishes
from emoe_jax.traces.coverage import best_experts

RIVALS = ("lru", "lfu", "static-task")
BELADY = "belady"
ENGINE = "engine"

REGRET_SHARE = 0.003
"""Of the time: the most that judging rivals may take. Where that is too little for all steps, windows are left out."""

MOST_STEPS, LEAST_STEPS, MOST_BYTES = 256, 16, 8 << 20
"""A window's steps, and what the wishes of one may take. Two windows exist at once, and the next uses of one."""

STEPS_AT_ONCE = 16
"""Steps whose next uses are looked for in one go. That takes about as long as to judge a step."""

Frequency = Callable[[str | None], Float[np.ndarray, "M E"]]
"""A task's mean routing, as shares."""


@dataclasses.dataclass
class Tally:
    """Sums over judged windows. A wish is a token's choice of an expert; a lookup is an expert that a step wants in a
    layer, however many of its tokens do.
    """

    wishes: int = 0
    lookups: int = 0
    loads: int = 0

    def add(self, other: Tally) -> None:
        """Add the other's three sums to these, in place."""
        self.wishes += other.wishes
        self.lookups += other.lookups
        self.loads += other.loads


class Window:
    """Wishes of consecutive steps, and what of them was resident. All its memory is taken at the start."""

    def __init__(self, steps: int, num_layers: int, num_experts: int):
        self.counts: Int[np.ndarray, "steps M E"] = np.zeros((steps, num_layers, num_experts), np.uint16)
        self.tasks: list[tuple[str | None, ...]] = []
        self.first = self.wanted = self.covered = Tally()
        self.clear()

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def is_full(self) -> bool:
        """Whether `add` has no room for another step."""
        return len(self) == len(self.counts)

    def clear(self) -> None:
        """Forget the steps. The memory is kept and `counts` still holds old numbers."""
        self.tasks, self.wanted, self.covered = [], Tally(), Tally()

    def add(
        self,
        counts: Int[np.ndarray, "M E"],
        resident_counts: Int[np.ndarray, "M E"],
        tasks: tuple[str | None, ...],
        loads: int,
    ) -> None:
        """Append one step. The window must not be full.

        `resident_counts` are those of its wishes that were resident when it ran. `loads` are the engine's loads since
        the step before. Counts above 65,535 are stored as 65,535.
        """
        self.counts[len(self)] = np.minimum(counts, np.iinfo(np.uint16).max)
        self.tasks.append(tasks)
        self.wanted.add(Tally(int(counts.sum()), int(np.count_nonzero(counts))))
        self.covered.add(Tally(int(resident_counts.sum()), int(np.count_nonzero(resident_counts)), loads))


class Regret:
    """`record` after every step: it notes the step's wishes, and judges those of an earlier one when that is due.

    A window of steps is recorded while the one before is judged, piece by piece, as often as `REGRET_SHARE` allows.
    Wishes that come while both are full are left out, so that time and memory are bounded whatever the traffic is.
    All policies are judged on the same windows, one after the other as if nothing lay between them, and so are the
    engine's residents.

    Rivals are replayed as `benchmarks.residency` does it. A step finds what was resident before it, whatever number of
    tokens it has; what it lacked is there for the next one. `static-task` knows the tasks of the step and may load
    anything when they change, at no cost. Belady's rule may do so too, and at the start of each window, whose end is
    all of the future that it knows. In between it loads only experts that the step before wanted. So none of the
    rivals has more lookups. Of wishes, a rival may cover more where steps have several tokens: the rule does not
    count the tokens that share an expert. Neither is a bound for an engine that loads ahead at any time.
    """

    def __init__(
        self,
        capacities: Sequence[int],
        num_experts: int,
        top_k: int,
        frequency: Frequency | None = None,
        rates: Float[np.ndarray, "M E"] | None = None,
        steps: int | None = None,
    ):
        """`rates` decide what is resident at first, as in `ResidencyPolicy`. Without `frequency` no task is known, and
        `static-task` is left out. `steps` are a window's, by default as many as `MOST_BYTES` hold.
        """
        M, self._top_k, self._frequency = len(capacities), top_k, frequency
        names = [name for name in RIVALS if frequency is not None or POLICIES[name].forecast != "task"]
        rules = [POLICIES[name].rule(M, num_experts, PolicyWeights()) for name in names]
        rates = np.zeros((M, num_experts), np.float32) if rates is None else np.asarray(rates, np.float32)
        self._rules = rules
        self._states = [rule.start(rates) for rule in rules]
        self._margins = np.zeros((len(rules) + 1, M, 1), np.float32)
        self._share_margins = np.zeros_like(self._margins)
        self._margins[:-1, :, 0] = np.array([[rule.margin] for rule in rules])
        self._share_margins[:-1, :, 0] = np.array([[rule.share_margin] for rule in rules])
        steps = steps or max(LEAST_STEPS, min(MOST_STEPS, MOST_BYTES // (2 * M * num_experts)))
        self.recorded, self.judged = Window(steps, M, num_experts), Window(steps, M, num_experts)
        """The steps that are being noted, and those that policies are being judged by."""
        self._next_use = np.zeros(self.judged.counts.shape, np.uint16)
        self._at: int | None = None  # the step of the judged window that is judged next; None: there is none to judge
        self._unseen = 0  # steps of it whose next uses are not known yet, the first ones
        self.resident: Bool[np.ndarray, "policies M E"] = np.zeros((len(rules) + 1, M, num_experts), bool)
        """What each rival has resident, Belady's rule last."""
        self._tasks: tuple[str | None, ...] | None = None
        self._pace = Pace(REGRET_SHARE)
        self._of_window = [Tally() for _ in range(len(rules) + 1)]
        self._totals = {name: Tally() for name in (ENGINE, *names, BELADY)}
        self._wanted = Tally()
        self._steps = self._left_out = self._loads_before = 0
        self._seconds = 0.0
        self._capacities = ()
        self.use_capacities(capacities, np.broadcast_to(rates, self.resident.shape))

    def use_capacities(
        self, capacities: Sequence[int], scores: Float[np.ndarray, "policies M E"] | None = None
    ) -> None:
        """Layers have so many slots from now on. Rivals keep their best experts; what was not judged yet is dropped."""
        if tuple(capacities) == self._capacities:
            return
        self._capacities = tuple(capacities)
        if scores is None:
            scores = np.concatenate([self.scores(), self.resident[-1:]])
        self.resident = best_experts(scores, capacities)
        shares = np.array(capacities)[:, None] / self.resident.shape[-1]
        self._margin = (self._margins + self._share_margins * shares)[..., 0]
        for window in (self.recorded, self.judged):
            window.clear()
        self._of_window = [Tally() for _ in self._of_window]
        self._at = None

    def record(
        self,
        counts: Int[np.ndarray, "M E"],
        resident_counts: Int[np.ndarray, "M E"],
        tasks: Sequence[str | None],
        loads: int,
    ) -> None:
        """A step's wishes, those of them that were resident, the tasks of its sequences, and the engine's loads since
        it was made.
        """
        began = time.perf_counter()
        new, self._loads_before = loads - self._loads_before, loads
        if self.recorded.is_full:
            self._left_out += 1
        elif counts.any():
            self.recorded.add(counts, resident_counts, tuple(tasks), new)
        if self.recorded.is_full and self._at is None:
            self.recorded, self.judged = self.judged, self.recorded
            self._at, self._unseen = 0, len(self.judged)
        while self._at is not None and self._pace.due:
            with self._pace.timed():
                self._judge_some()
        self._seconds += time.perf_counter() - began

    def scores(self) -> Float[np.ndarray, "policies M E"]:
        """The present worth of every expert to each rival but Belady's rule, in the order of `state`."""
        return np.stack([rule.scores(state) for rule, state in self._scored()])

    def state(self) -> dict[str, Any]:
        """Judged windows as JSON-able values; shares are None before the first."""
        wishes, lookups = self._wanted.wishes, self._wanted.lookups
        return {
            "steps": self._steps,
            "steps_left_out": self._left_out,
            "window_steps": len(self.judged.counts),
            "seconds": round(self._seconds, 6),
            "wishes": wishes,
            "lookups": lookups,
            "policies": {
                name: {
                    "wishes": tally.wishes,
                    "coverage": tally.wishes / wishes if wishes else None,
                    "lookups": tally.lookups,
                    "hit_rate": tally.lookups / lookups if lookups else None,
                    "loads": tally.loads,
                }
                for name, tally in self._totals.items()
            },
        }

    def _scored(self) -> Any:
        return zip(self._rules, self._states, strict=True)

    def _judge_some(self) -> None:
        """A piece of the work: from the window's end, look when experts are wished for; then judge step by step."""
        if self._unseen:
            first, last = max(0, self._unseen - STEPS_AT_ONCE), self._unseen
            after = self._next_use[last] if last < len(self.judged) else None
            self._next_use[first:last] = next_use(self.judged.counts[first:last] > 0, after)
            self._unseen = first
        else:
            self._judge_step()

    def _judge_step(self) -> None:
        """Have every policy exchange experts before the next step of the window, and see what the step finds."""
        window, step = self.judged, self._at
        assert step is not None
        tasks = window.tasks[step]
        is_new = self._frequency is not None and Counter(tasks) != Counter(self._tasks or ())
        if is_new:
            self._plan(tasks)
        counts = window.counts[step]
        scores = np.concatenate([self.scores(), -self._next_use[step : step + 1].astype(np.float32)])
        loadable = np.ones_like(self.resident)
        if step and not is_new:
            loadable[-1] = window.counts[step - 1] > 0
        moved = exchange(self.resident, scores, loadable, self._margin)
        found = np.where(self.resident, counts, 0)
        wishes, lookups = found.sum((1, 2), dtype=np.int64), np.count_nonzero(found, axis=(1, 2))
        for tally, *numbers in zip(self._of_window, wishes.tolist(), lookups.tolist(), moved.tolist(), strict=True):
            tally.add(Tally(*numbers))
        wished = counts.astype(np.float32)
        self._states = [rule.observe(state, wished) for rule, state in self._scored()]
        self._at = step + 1
        if self._at == len(window):
            self._close_window()

    def _plan(self, tasks: tuple[str | None, ...]) -> None:
        assert self._frequency is not None
        rates = np.zeros(self.resident.shape[1:], np.float32)
        for task, count in Counter(tasks).items():
            rates += np.float32(self._top_k * count) * self._frequency(task).astype(np.float32)
        expected = ExpectedWishes(rates, rates, 0.0)
        self._states = [rule.plan(state, expected) for rule, state in self._scored()]
        self._tasks = tasks

    def _close_window(self) -> None:
        window = self.judged
        for tally, part in zip(self._totals.values(), (window.covered, *self._of_window), strict=True):
            tally.add(part)
        self._wanted.add(window.wanted)
        self._steps += len(window)
        self._of_window = [Tally() for _ in self._of_window]
        window.clear()
        self._at = None
