"""Residency kept ahead of requests: planner and policy told of requests and wishes, and what that costs the host."""

import contextlib
import time
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from emoe_jax.engine.accounts import TaskAccounts
from emoe_jax.engine.sequence import Sequence
from emoe_jax.experts.pace import Pace
from emoe_jax.experts.residency import Residency
from emoe_jax.planner import ResidencyPlanner
from emoe_jax.planner.demand import Progress
from emoe_jax.scheduling.plan import StepPlan
from emoe_jax.scheduling.scheduler import Scheduler

PLANNING_SHARE = 0.006
"""Of the time: the most that planning for changed requests may take while the device is busy."""


class Foresight:
    """`arrived`, then `before_step` and `after_step` around every step, then `ended`. Owned by the step's owner."""

    def __init__(self, residency: Residency, planner: ResidencyPlanner | None, top_k: int):
        self.wants_embeddings = planner is not None and planner.predicts
        self._residency = residency
        self._planner = planner
        self._accounts = TaskAccounts(top_k)
        self._planning = Pace(PLANNING_SHARE)
        self._seconds = 0.0

    def warm_up(self) -> None:
        """Compile the predictor, if there is one."""
        if self._planner is not None:
            self._planner.warm_up()

    def arrived(self, sequence: Sequence, embedding: Float[np.ndarray, " d"] | None) -> None:
        """A request came, of which this is the first sequence; `embedding` is the mean of its prompt's, if wanted."""
        if self._planner is not None:
            prompt_tokens, params = len(sequence.prompt_token_ids), sequence.params
            with self._timed():
                self._planner.begin(sequence.request_id, sequence.task, prompt_tokens, params.max_tokens, embedding)

    def before_step(self, plan: StepPlan, scheduler: Scheduler, idle: bool) -> None:
        """Decide on experts for the steps after `plan`, where the requests that run now or next have changed: at once
        if the device is idle or their tasks are others, else as often as time allows. Nothing where all are resident.
        """
        if self._planner is None or self._residency.is_full:
            return
        with self._timed():
            at_hand = _progress(plan, scheduler)
            if idle or self._planning.due or self._planner.is_urgent(at_hand):
                with self._planning.timed():
                    expected = self._planner.plan_for(at_hand)
                    if expected is not None:
                        self._residency.plan(*expected)

    def slots_changed(self) -> None:
        """Layers have other numbers of slots."""
        if self._planner is not None:
            self._planner.use_capacities(self._residency.table.capacities)

    def settle(self, plan: StepPlan, seconds: float) -> None:
        """Wait for what was planned, where nobody's next token and no `exact` step waits with it."""
        resident = any(sequence.routing == "resident" for sequence in plan.sequences)
        if self._planner is not None and resident and not plan.decodes:
            self._residency.settle(seconds)

    def after_step(self, wish_counts: Int[np.ndarray, "M E"], resident_counts: Int[np.ndarray, "M E"]) -> None:
        """Let the policy follow a step's wishes, of which those for `resident_counts` found their expert there."""
        with self._timed():
            covered = self._residency.observe(wish_counts, resident_counts)
            if self._planner is not None and covered is not None:
                self._planner.observe(covered.wishes, covered.resident, covered.steps)

    def ended(self, sequences: Rows[Sequence]) -> None:
        """A request ended; these were its sequences."""
        routed = [sequence.routing_counts for sequence in sequences if sequence.routing_counts is not None]
        if routed:
            self._accounts.add(sequences)
        if self._planner is not None:
            with self._timed():
                self._planner.end(sequences[0].request_id, np.sum(routed, axis=0) if routed else None)

    def state(self) -> dict[str, Any]:
        """The engine state's parts on residency, planning and tasks."""
        planner = {"planning_seconds": round(self._seconds, 6)}
        if self._planner is not None:
            planner |= self._planner.state()
        return {"residency": self._residency.state(), "planner": planner, "tasks": self._accounts.state()}

    def close(self) -> None:
        """Join the threads of loader and predictor."""
        self._residency.close()
        if self._planner is not None:
            self._planner.close()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - began


def _progress(plan: StepPlan, scheduler: Scheduler) -> dict[str, Progress]:
    """Of the requests that run or will start next: where they are once `plan` is done."""
    at_hand: dict[str, Progress] = {}
    computed = {chunk.sequence: chunk.start + chunk.length for chunk in plan.prefills}
    samples = {*plan.decodes, *(chunk.sequence for chunk in plan.prefills if chunk.is_last)}
    for sequence in scheduler.running:
        progress = Progress(computed.get(sequence, sequence.num_computed), sequence.num_sampled + (sequence in samples))
        at_hand.setdefault(sequence.request_id, progress)
    for sequence in scheduler.next_up(plan.now):
        at_hand.setdefault(sequence.request_id, Progress())
    return at_hand
