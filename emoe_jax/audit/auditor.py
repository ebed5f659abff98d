"""`Auditor`: computes some answers once more, with every expert that they wish for, and compares the logits."""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np

from emoe_jax.audit.findings import Finding, Findings
from emoe_jax.audit.mix import Wishes
from emoe_jax.audit.target import QualityTarget
from emoe_jax.device.dispatcher import Dispatcher
from emoe_jax.engine_config import EngineConfig
from emoe_jax.policies.pace import Pace
from emoe_jax.requests.sequence import Sequence, SequenceStatus, substituted_share
from emoe_jax.requests.served import MOST_AUDITED, ServedLogits
from emoe_jax.residency.residency import Residency
from emoe_jax.scheduling.plan import PrefillChunk, StepPlan
from emoe_jax.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

SEARCHING_RATE = 0.5
"""Share of a task's answers that are audited while its tolerance is searched for."""

BUSY_SHARE = 0.015
"""Of the time: the most that audits take while other requests run."""

SEARCHING_SHARE = 0.1
"""The same while a tolerance is searched for."""

MOST_QUEUED = 8
"""Answers that wait for their audit. The one that waited longest is given up for a newer one."""

CHUNK = 128
"""Tokens of an audit that are computed before requests get their turn again."""


@dataclasses.dataclass(frozen=True)
class _Audit:
    """An answer that ended, and its text as a sequence of its own."""

    answer: Sequence
    text: Sequence

    @property
    def lost_nothing(self) -> bool:
        """Whether every expert that the answer wished for was there, so that nothing is to be computed."""
        return not self.answer.substituted and not self.answer.num_cached


class Auditor:
    """`arrived` and `ended` for every request; `step` computes a piece of an audit when it is `due`.

    An answer is audited as a prompt of its own, `exact`, with pages of its own: keys and values that were computed with
    substitutes count as what they are, a loss. Nothing that is returned to clients changes. Owned by the step's owner.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        residency: Residency,
        scheduler: Scheduler,
        options: EngineConfig,
        target: QualityTarget | None,
    ):
        """`target` holds the tolerances that follow from what audits find, if they do."""
        self.findings = Findings()
        self.target = target
        self._dispatcher, self._residency = dispatcher, residency
        self._pool, self._chunk = scheduler.pool, min(CHUNK, scheduler.prefill_chunk)
        # Where routers drop tokens over capacity, what a token gets depends on the rows that it was computed with.
        self.rate = options.audit_rate if options.router_capacity_factor is None else 0.0
        """Share of the answers to requests that come from now on."""
        self._draws = np.random.default_rng(options.seed)
        self._queue: deque[_Audit] = deque()
        self._kept: list[Sequence] = []
        self._current: _Audit | None = None
        self._paces = {share: Pace(share, work=time.monotonic) for share in (BUSY_SHARE, SEARCHING_SHARE)}
        self._audits = self._given_up = 0
        self._seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether an answer waits for its audit."""
        return self._current is not None or bool(self._queue)

    def arrived(self, sequences: Rows[Sequence]) -> None:
        """A request came: decide whether its first answer will be audited. None is while `MOST_AUDITED` are under way:
        each keeps rows over the vocabulary.
        """
        first = sequences[0]
        if self.rate == 0 or self._residency.is_full or first.allowance.tolerance == 0:
            return
        if self._draws.random() < (SEARCHING_RATE if self._is_searching(first) else self.rate):
            self._kept = [sequence for sequence in self._kept if not sequence.finished]
            if len(self._kept) < MOST_AUDITED:
                first.served = ServedLogits(first.seed)
                self._kept.append(first)

    def ended(self, sequence: Sequence) -> None:
        """An answer came to its end."""
        if self.target is not None and sequence.tuned:
            search, tokens = self.target.search(sequence.task), len(sequence.generated)
            search.ended(sequence.allowance.tolerance, _wishes_of(sequence), tokens, self._given_up_by(sequence))
        served = sequence.served
        if served is None or not len(served.positions):
            return
        # One that lost nothing waits its turn, too: else only those that lost something would ever be given up.
        tokens = sequence.tokens(0, int(served.positions[-1]) + 1)
        text = Sequence(f"audit of {sequence.request_id}", tokens, routing="exact", compared_with=served)
        self._queue.append(_Audit(sequence, text))
        if len(self._queue) > MOST_QUEUED:
            self._queue.popleft()
            self._given_up += 1

    def due(self, idle: bool) -> bool:
        """Whether to `step` now, with no step in flight; `idle` if no request waits or runs."""
        if not self.has_work:
            return False
        audit = self._current or self._queue[0]
        share = SEARCHING_SHARE if self._is_searching(audit.answer) else BUSY_SHARE
        return idle or self._paces[share].due

    def step(self) -> None:
        """Compute a piece of an audit, and wait for it. Raises what the device or the expert store raise, after which
        the audit is given up.
        """
        began = time.monotonic()
        with self._paces[BUSY_SHARE].timed(), self._paces[SEARCHING_SHARE].timed():
            try:
                self._advance()
            except Exception:
                self.give_up()
                raise
            finally:
                self._seconds += time.monotonic() - began

    def give_up(self) -> None:
        """Leave the audit that is under way: its pages are wanted, or lost."""
        if self._current is not None:
            self._release(self._current.text)
            self._current = None
            self._given_up += 1

    def state(self) -> dict[str, Any]:
        """Rate, counts and seconds since the start, the findings, and the target with the tolerances found for it."""
        return {
            "rate": self.rate,
            "audits": self._audits,
            "given_up": self._given_up,
            "waiting": len(self._queue) + (self._current is not None),
            "seconds": round(self._seconds, 6),
            "contracts": self.findings.state(),
            "target": None if self.target is None else self.target.state(),
        }

    def _is_searching(self, answer: Sequence) -> bool:
        return self.target is not None and answer.tuned and not self.target.search(answer.task).settled

    def _advance(self) -> None:
        if self._current is None:
            audit = self._queue.popleft()
            needed = self._pool.needed(len(audit.text.prompt_token_ids))
            if not self._pool.can_allocate(needed):
                self._given_up += 1
                return
            if audit.lost_nothing:
                self._book(audit.answer, 0.0, 1.0)
                return
            audit.text.pages = self._pool.allocate(needed)
            self._current = audit
        text = self._current.text
        start = text.num_computed
        length = min(self._chunk, len(text.prompt_token_ids) - start)
        plan = StepPlan((), (PrefillChunk(text, start, length, is_last=False),), time.monotonic())
        dispatched = self._dispatcher.dispatch(plan)
        self._dispatcher.in_flight.pop()
        result = self._dispatcher.collect(dispatched)
        if result.not_finite:
            self.give_up()
            return
        text.num_computed += length
        if text.num_computed == len(text.prompt_token_ids):
            answer, served = self._current.answer, text.compared_with
            self._release(text)
            self._current = None
            assert served is not None
            self._book(answer, float(np.mean([*served.kl.values()])), float(np.mean([*served.agrees.values()])))

    def _given_up_by(self, answer: Sequence) -> float:
        """The share of an answer's router weight that was substituted."""
        return substituted_share(answer.substituted_weight, answer.assigned, self._residency.config.top_k)

    def _release(self, text: Sequence) -> None:
        self._pool.free(text.pages)
        text.pages, text.status = [], SequenceStatus.FINISHED

    def _book(self, answer: Sequence, kl: float, agreement: float) -> None:
        self._audits += 1
        means = max(0.0, kl), agreement
        finding = Finding(len(answer.generated), *means, answer.allowance.tolerance, self._given_up_by(answer))
        self.findings.add(answer.routing, answer.task, finding)
        if self.target is not None and answer.tuned:
            self.target.search(answer.task).found(finding, _wishes_of(answer))


def _wishes_of(answer: Sequence) -> Wishes:
    assert answer.routing_counts is not None
    return Wishes.of(answer.routing_counts)
