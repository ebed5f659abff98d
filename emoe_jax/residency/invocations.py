"""`Invocations`: which prompts the predictor is asked about, counted in the order in which they are admitted."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from emoe_jax.engine_config import PredictEvery
from emoe_jax.predictor import Predictor
from emoe_jax.residency.cadence import Cadence
from emoe_jax.residency.demand import Demand
from emoe_jax.residency.forecaster import Finished, Forecaster, Question

MOST_PENDING = 1024
"""Questions without an answer. Further prompts are not asked about, and counted as missed."""


@dataclasses.dataclass(eq=False)
class PlannedRequest:
    """A request of which the planner was told."""

    task: str
    embedding: Float[Array | np.ndarray, " d"] | None
    demand: Demand
    tokens: Sequence[int] = ()
    """The prompt's token ids, where the predictor reads them."""
    admitted: bool = False
    """Whether it was counted: it has started, or is next in line."""
    number: int | None = None
    """The number of the question about it, if there is one."""
    predicted: Float[np.ndarray, "M E"] | None = None
    """The prediction for this prompt, whether or not the gate lets it count. None before it was made."""
    counts: Int[np.ndarray, "M E"] | None = None
    """How often it wished for each expert, once it has ended."""

    @property
    def unanswered(self) -> bool:
        """Whether a question about this request was asked and has no answer yet."""
        return self.number is not None and self.predicted is None


class Invocations:
    """`admit` prompts before they start: of every p, the first is asked about. `take` has the answers.

    Prompts that are admitted together are asked about together. One that ends before its answer comes is still asked
    about; one that never started gives its question, where that can be withdrawn, to the next.
    """

    def __init__(self, predictor: Predictor, every: PredictEvery, clock: Callable[[], float] = time.perf_counter):
        """`clock` (seconds) measures what predictions cost."""
        self.forecaster = Forecaster(predictor, clock=clock)
        self.cadence = Cadence()
        self._fixed = None if every == "auto" else every
        self._since = 0  # prompts admitted since the last question, its own included; 0: the next is asked about
        self._numbers = itertools.count()
        self._pending: dict[int, tuple[PlannedRequest, bool]] = {}  # unanswered, and whether they were asked early
        self._predicted = self._early = self._missed = self._calls = self._insensitive = 0

    @property
    def every(self) -> int:
        """p at present."""
        return self.cadence.every if self._fixed is None else self._fixed

    @property
    def error(self) -> str | None:
        """The error that ended the predictor, or None."""
        return self.forecaster.error

    def admit(self, requests: Iterable[PlannedRequest]) -> bool:
        """Count requests that were not counted yet, in this order, and ask about those whose turn it is, together.

        Requests of tasks to which no layer is sensitive do not count. Returns whether anything was asked.
        """
        asked: list[PlannedRequest] = []
        for request in requests:
            if request.admitted:
                continue
            request.admitted = True
            if not request.demand.sensitivity.any():
                self._insensitive += 1
                continue
            if self._since and self._since < self.every:
                self._since += 1
            else:
                self._since = 1
                asked.append(request)
        self._ask(asked, early=False)
        return bool(asked)

    def ask_early(self, requests: Iterable[PlannedRequest]) -> None:
        """Ask about these at once, besides those whose turn it is; those asked about before are left out."""
        self._ask([one for one in requests if one.number is None and one.demand.sensitivity.any()], early=True)

    def never_started(self, request: PlannedRequest) -> None:
        """A request ended of which nothing was computed: it does not count, where that can still be helped."""
        if request.unanswered:
            assert request.number is not None
            if self.forecaster.withdraw(request.number):
                del self._pending[request.number]
                self._since = 0
        elif request.admitted and request.number is None:
            self._since = max(1, self._since - 1)

    def take(self) -> Iterator[tuple[PlannedRequest, Float[np.ndarray, "M E"]]]:
        """What was answered since the last call, in order of the questions."""
        for forecast in self.forecaster.poll():
            self._calls += 1
            self.cadence.predicted(forecast.seconds, len(forecast.shares))
            for number, shares in forecast.shares.items():
                request, early = self._pending.pop(number)
                request.predicted = shares
                self._early += early
                self._predicted += not early
                yield request, shares

    def given_up(self) -> list[PlannedRequest]:
        """Requests that will not be predicted because the predictor failed, once."""
        if self.error is None or not self._pending:
            return []
        lost, self._pending = [request for request, _ in self._pending.values()], {}
        return lost

    def wait(self, requests: Iterable[PlannedRequest], seconds: float) -> None:
        """Until those of them that were asked about are predicted, or the time is over."""
        numbers = [request.number for request in requests if request.number is not None and request.unanswered]
        if numbers:
            self.forecaster.wait(numbers, seconds)

    def tell(self, request: PlannedRequest) -> None:
        """The predictor may learn from a request that has run."""
        assert request.counts is not None
        self.forecaster.tell(Finished(request.task, request.embedding, request.counts))

    def state(self) -> dict[str, Any]:
        """Counts and cost as JSON-able values. A prompt counts as predicted from the question on."""
        pending_early = sum(early for _, early in self._pending.values())
        return {
            "predict_every": self.every,
            "predict_every_auto": self._fixed is None,
            "prompts_since": self._since,
            "predictions": self._predicted + len(self._pending) - pending_early,
            "early_predictions": self._early + pending_early,
            "invocations": self._calls,
            "missed": self._missed,
            "insensitive": self._insensitive,
            "seconds": round(self.forecaster.seconds, 6),
            **self.cadence.state(),
        }

    def _ask(self, requests: list[PlannedRequest], early: bool) -> None:
        if self.error is not None:
            return
        room = max(0, MOST_PENDING - len(self._pending))
        self._missed += len(requests[room:])
        questions = []
        for request in requests[:room]:
            request.number = next(self._numbers)
            self._pending[request.number] = (request, early)
            questions.append(Question(request.number, request.task, request.embedding, request.tokens))
        self.forecaster.ask(questions)
