"""The loop of an engine: dispatch a step, and book the one before while the device computes."""

import logging
import time
from collections import deque
from collections.abc import Mapping

from emoe_jax.audit.auditor import Auditor
from emoe_jax.device.dispatcher import Dispatched
from emoe_jax.engine.answer import Answer
from emoe_jax.engine.deliveries import Deliveries
from emoe_jax.engine.loading import EngineParts
from emoe_jax.engine.vitals import StepTimes, Vitals
from emoe_jax.memory.trade import MemoryTrade
from emoe_jax.requests.guide import settle
from emoe_jax.requests.request import Delta, FinishReason
from emoe_jax.requests.sequence import Sequence, SequenceStatus
from emoe_jax.residency.foresight import Foresight
from emoe_jax.scheduling.plan import StepPlan, StepResult

log = logging.getLogger(__name__)

NOT_FINITE = "the model computed numbers that are not finite"


class StepLoop:
    """Schedules, dispatches and books the steps of an engine; at most two are on the device at once."""

    def __init__(
        self,
        parts: EngineParts,
        foresight: Foresight,
        trade: MemoryTrade,
        auditor: Auditor,
        answers: Mapping[str, Answer],
        deliveries: Deliveries,
    ):
        """`answers` are the engine's, by request."""
        self._runner, self._scheduler, self._residency = parts.runner, parts.scheduler, parts.residency
        self.dispatcher = parts.dispatcher
        self._foresight, self._trade, self._auditor = foresight, trade, auditor
        self._answers, self._deliveries = answers, deliveries
        self.overlap = parts.options.overlap
        self._load_wait = parts.options.load_wait_ms / 1e3  # seconds that a prompt waits for its experts
        self.in_flight = self.dispatcher.in_flight  # at most two
        self.steps = 0
        self.step_seconds = 0.0
        self._step_times = StepTimes()
        self.not_finite = 0
        """Completions that ended because the model computed NaN or infinity."""
        self._waited_before: deque[float] = deque()  # seconds that steps had waited when each was planned
        self._waited_at_collect = 0.0
        self._compiled_at_collect = 0.0
        self._over: tuple[float, float, float] | None = None  # `_now` when the oldest step ended, if known
        self._collected_at = 0.0
        self._suspect = False  # whether a step has failed since weights were last looked after

    def run(self) -> list[Delta]:
        """One step: what it added to the answers. Raises what the device or the expert store raised."""
        if self.in_flight and all(sequence.finished for sequence in self.in_flight[0].plan.sequences):
            self._collect()  # no sequence waits for it
        due = self._trade.look()
        audits = self._auditor.due(idle=not self._scheduler.has_work)
        if not self.in_flight:
            if due is not None:
                self._auditor.give_up()
                self._trade.trade(due)
            elif audits:
                self._audit()
            self._dispatch()
            audits = False
        alone = due is not None or audits  # what is due next finds no step in flight
        if self.overlap and not alone and self.in_flight and self._may_build_on(self.in_flight[-1]):
            self._dispatch()
        return self._collect() if self.in_flight else []

    @property
    def vitals(self) -> Vitals:
        """From any thread: what tells a step that hangs from one that is at work."""
        loads = self._residency.loads
        return Vitals(
            self._step_times.longest,
            (self.steps, loads.staged_bytes, loads.retries, loads.failures),
            self._runner.executables.compiling,
        )

    def _audit(self) -> None:
        """Compute a piece of an audit. What goes wrong ends the audit, and no request."""
        try:
            self._auditor.step()
        except Exception:
            log.exception("an audit came to nothing")
            self._suspect = True

    def _may_build_on(self, dispatched: Dispatched) -> bool:
        """Whether the next step may begin. Where this one is doubtful, it stands then, and is booked meanwhile."""
        if dispatched.plan.needs_tokens:
            return False
        if self.dispatcher.is_doubtful(dispatched):
            self._wait_for(dispatched)
        return dispatched.error is None

    def _wait_for(self, dispatched: Dispatched) -> None:
        """Wait until the oldest step in flight is over: what follows is not its time."""
        self.dispatcher.wait(dispatched)
        self._over = self._over or self._now()

    def _now(self) -> tuple[float, float, float]:
        """The time, and the seconds that went into waiting for loads and into the compiler until then."""
        return time.monotonic(), self._foresight.waited_seconds, self._runner.executables.seconds

    def _dispatch(self) -> None:
        """Have the device begin the next step, if there is anything to do."""
        held = [sequence for sequence in self._scheduler.running if sequence.held]
        if held:
            guides = [s.adjustment.guide for s in held if s.adjustment is not None and s.adjustment.guide is not None]
            only = len(held) == self._scheduler.num_running and not self._scheduler.num_waiting
            settle(guides, idle=only and not self.in_flight)
        began = time.monotonic()
        if self._suspect:
            if self.in_flight:
                return  # its tokens are read first: the failed step may have taken the KV cache along
            self._residency.mend()
            if self._runner.mend():
                count = self._scheduler.num_running
                log.error("a failed step lost the KV cache; %d running sequences are computed again", count)
                self._auditor.give_up()
                self._scheduler.pages_lost()
            self._suspect = False
        self._residency.commit()
        if not self._scheduler.has_work:
            return
        plan = self._scheduler.schedule(began)
        waited = self._foresight.waited_seconds
        self._foresight.before_step(plan, self._scheduler, idle=not self.in_flight, wait=self._load_wait)
        if not plan:
            return
        if not self.in_flight:
            self._foresight.settle(plan, self._load_wait)
        elif self.dispatcher.waits_within(plan):  # most of this step is over once it is dispatched: it is timed apart
            self._wait_for(self.in_flight[0])
        try:
            self.dispatcher.dispatch(plan)
            self._waited_before.append(waited)
        except Exception as error:
            self._fail(plan, error)
            raise
        self._scheduler.dispatched(plan)

    def _collect(self) -> list[Delta]:
        """Wait for the oldest step in flight and book it."""
        dispatched, waited_before = self.in_flight.popleft(), self._waited_before.popleft()
        plan = dispatched.plan
        try:
            result = self.dispatcher.collect(dispatched)
        except Exception as error:
            self._over = None
            self._fail(plan, error)
            self._scheduler.update(plan, StepResult({}))
            raise
        ended = time.monotonic()
        over, waited_by_then, compiled = self._over or self._now()
        self._over = None
        seconds = over - max(plan.now, self._collected_at)  # the device was busy with the step before until then
        self._collected_at = over
        # Of that time, what went into waiting for loads and predictions is no computing time.
        waited = waited_by_then - max(waited_before, self._waited_at_collect)
        self._waited_at_collect = waited_by_then
        seconds = max(waited, seconds - (compiled - self._compiled_at_collect))  # nor what went into the compiler
        self._compiled_at_collect = compiled
        self.steps += 1
        self._step_times.took(seconds)
        awaited = [sequence for sequence in result.sampled if sequence.status is SequenceStatus.RUNNING]
        lost = [sequence for sequence in result.not_finite if sequence.status is SequenceStatus.RUNNING]
        self._scheduler.update(plan, result, seconds, waited=waited, ended=ended)
        self._foresight.after_step(plan, result.wishes, max(0.0, seconds - waited))
        deltas = [self._lose(sequence) for sequence in lost]
        for sequence in awaited:
            answer = self._answers[sequence.request_id]
            delta, stopped = answer.add(sequence, result.sampled[sequence])
            if stopped:
                self._scheduler.finish(sequence, "stop")
            deltas.append(delta)
            if sequence.finished:
                self._auditor.ended(sequence)
            if sequence.adjustment is not None and not sequence.finished:
                sequence.adjustment.update(sequence.generated)
            if answer.finished:
                self._foresight.ended(answer.sequences)
        self.step_seconds += seconds + time.monotonic() - ended
        return deltas

    def _lose(self, sequence: Sequence) -> Delta:
        """End a completion for which the model computed NaN or infinity."""
        answer = self._answers[sequence.request_id]
        if all(completion.error is None for completion in answer.output.completions):  # once per request
            fields = {"request": sequence.request_id, "routing": sequence.routing, "tokens": sequence.num_known}
            log.error("a request ended: %s", NOT_FINITE, extra={"fields": fields})
        self.not_finite += 1
        delta = answer.fail(sequence, NOT_FINITE)
        if answer.finished:
            self._foresight.ended(answer.sequences)
        return delta

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """End the sequences of a plan that came to nothing."""
        self._suspect = True
        for sequence in plan.sequences:
            if not sequence.finished:
                self._deliveries.fail(sequence.request_id, error)
                self._scheduler.finish(sequence, "error")
                self.end(sequence, "error")

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a completion without a token, and with the last one its request."""
        answer = self._answers[sequence.request_id]
        answer.end(sequence, reason)
        if answer.finished:
            self._foresight.ended(answer.sequences)
