"""Residency kept ahead of requests: planner and policy told of requests and wishes, and what that costs the host."""

import contextlib
import time
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from emoe_jax.policies.pace import Pace
from emoe_jax.policies.regret import Regret
from emoe_jax.requests.sequence import Sequence
from emoe_jax.residency.accounts import TaskAccounts
from emoe_jax.residency.demand import RequestProgress
from emoe_jax.residency.planner import ResidencyPlanner
from emoe_jax.residency.residency import Residency, StepWishes
from emoe_jax.scheduling.plan import StepPlan
from emoe_jax.scheduling.scheduler import Scheduler

PLANNING_SHARE = 0.006
"""Of the time: the most that planning for changed requests may take while the device is busy."""

LOOK_AHEAD = 16
"""The most waiting sequences whose prompts are asked about before a place is free."""


class Foresight:
    """`arrived`, then `before_step` and `after_step` around every step, then `ended`. Owned by the step's owner."""

    def __init__(self, residency: Residency, planner: ResidencyPlanner | None, regret: Regret, top_k: int):
        self.wants_embeddings = planner is not None and planner.predicts
        self._residency = residency
        self._planner = planner
        self._regret = regret
        self._accounts = TaskAccounts(top_k)
        self._planning = Pace(PLANNING_SHARE)
        self._seconds = self._awaited = self._awaited_now = 0.0
        self._line_changed = False

    @property
    def waited_seconds(self) -> float:
        """How long steps have waited so far, for loads and for predictions."""
        return self._residency.waited_seconds + self._awaited

    def warm_up(self) -> None:
        """Compile the predictor, if there is one."""
        if self._planner is not None:
            self._planner.warm_up()

    def arrived(self, sequence: Sequence, embedding: Float[Array | np.ndarray, " d"] | None) -> None:
        """A request came, of which this is the first sequence; `embedding` is the mean of its prompt's, if wanted."""
        if self._planner is not None:
            tokens, most = sequence.prompt_token_ids, sequence.params.max_tokens
            read = tokens if self._planner.reads_tokens else ()
            self._line_changed = True
            with self._timed():
                self._planner.begin(sequence.request_id, sequence.task, len(tokens), most, embedding, read)

    def before_step(self, plan: StepPlan, scheduler: Scheduler, idle: bool, wait: float) -> None:
        """Ask about prompts that start with `plan` or next, and decide on experts for the steps after it, where the
        requests that run now or next have changed: at once if the device is idle or their tasks are others, else as
        often as time allows. An idle device waits up to `wait` seconds for predictions, where no next token and no
        `exact` step waits with it. Nothing is decided where all experts are resident.
        """
        if self._planner is None:
            return
        with self._timed():
            self._admit(plan, scheduler)
        if self._residency.is_full:
            return
        self._awaited_now = 0.0
        if idle and _may_wait(plan):
            began = time.monotonic()
            self._planner.await_forecasts(dict.fromkeys(sequence.request_id for sequence in plan.sequences), wait)
            self._awaited_now = time.monotonic() - began
            self._awaited += self._awaited_now
        with self._timed():
            at_hand = progress_of(plan, scheduler)
            if idle or self._planning.due or self._planner.is_urgent(at_hand):
                with self._planning.timed():
                    expected = self._planner.plan_for(at_hand)
                    if expected is not None:
                        self._residency.plan(expected)

    def settle(self, plan: StepPlan, seconds: float) -> None:
        """Wait for planned loads, up to `seconds`, with the wait for predictions in `before_step` included.

        Does not wait where a next token, or an `exact` step, would wait with it.
        """
        if self._planner is not None and _may_wait(plan):
            self._residency.settle(seconds - self._awaited_now)

    def slots_changed(self) -> None:
        """Layers have other numbers of slots."""
        self._regret.use_capacities(self._residency.table.capacities)
        if self._planner is not None:
            self._planner.use_capacities(self._residency.table.capacities)

    def after_step(self, plan: StepPlan, wishes: StepWishes, seconds: float) -> None:
        """Let the policy follow the wishes of a step that computed for `seconds`. What other policies would have made
        of them is noted where not all experts are resident.
        """
        with self._timed():
            if self._planner is not None:
                self._planner.computed(seconds)
            covered = self._residency.observe(*wishes)
            if self._planner is not None and covered is not None:
                self._planner.observe(covered.wishes, covered.resident, covered.steps)
        if not self._residency.is_full:
            tasks = [sequence.task for sequence in plan.sequences]
            self._regret.record(wishes.counts, wishes.resident, tasks, self._residency.loads.loads)

    def ended(self, sequences: Rows[Sequence]) -> None:
        """A request ended; these were its sequences."""
        routed = [sequence.routing_counts for sequence in sequences if sequence.routing_counts is not None]
        if routed:
            self._accounts.add(sequences)
        if self._planner is not None:
            with self._timed():
                self._planner.end(sequences[0].request_id, np.sum(routed, axis=0) if routed else None)

    def state(self) -> dict[str, Any]:
        """The engine state's parts on residency, planning, regret and tasks."""
        planner: dict[str, Any] = {"planning_seconds": round(self._seconds, 6)}
        if self._planner is not None:
            planner |= self._planner.state()
            planner["serves"] = self._planner.serves(self._residency.table.resident_mask)
        return {
            "residency": self._residency.state(),
            "planner": planner,
            "regret": self._regret.state(),
            "tasks": self._accounts.state(),
        }

    def close(self) -> None:
        """Join the threads of loader and predictor."""
        self._residency.close()
        if self._planner is not None:
            self._planner.close()

    def _admit(self, plan: StepPlan, scheduler: Scheduler) -> None:
        """Tell the planner of prompts that start with `plan`, in order of their start, then of those next in line."""
        assert self._planner is not None
        starting = [chunk.sequence.request_id for chunk in plan.prefills if chunk.sequence.started_at == plan.now]
        if starting or self._line_changed:
            self._line_changed = False
            line = (sequence.request_id for sequence in scheduler.line(plan.now, LOOK_AHEAD))
            self._planner.admit([*starting, *line])

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - began


def _may_wait(plan: StepPlan) -> bool:
    """Whether a step can wait without delaying the next token of a sequence, or an `exact` step."""
    return not plan.decodes and any(sequence.routing == "resident" for sequence in plan.sequences)


def progress_of(plan: StepPlan, scheduler: Scheduler) -> dict[str, RequestProgress]:
    """Of the requests that run: where they are once `plan` is done.

    Requests that wait are left out. They have more tokens ahead of them than the running ones, so by eq. 2 a plan for
    both would take the experts away from answers that are about to end.
    """
    at_hand: dict[str, RequestProgress] = {}
    computed = {chunk.sequence: chunk.start + chunk.length for chunk in plan.prefills}
    samples = {*plan.decodes, *(chunk.sequence for chunk in plan.prefills if chunk.is_last)}
    for sequence in scheduler.running:
        progress = RequestProgress(
            computed.get(sequence, sequence.num_computed), sequence.num_sampled + (sequence in samples)
        )
        at_hand.setdefault(sequence.request_id, progress)
    return at_hand
