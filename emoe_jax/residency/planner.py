"""`ResidencyPlanner`: watches requests come, run and end, and says what the resident experts should be planned for."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.engine_config import PredictEvery
from emoe_jax.policies.rule import ExpectedWishes
from emoe_jax.predictor import Predictor
from emoe_jax.residency.demand import Demand, RequestProgress, expected_rates, mean_sensitivity
from emoe_jax.residency.frequencies import TaskFrequencies
from emoe_jax.residency.invocations import Invocations, PlannedRequest
from emoe_jax.residency.judges import Drift, Gate
from emoe_jax.tasks import OTHER, TaskProfile
from emoe_jax.traces.coverage import coverage, expected_coverage

UNKNOWN_OUTPUT_TOKENS = 64.0
"""Expected answer length where no task was profiled."""

URGENT = 0.25
"""Share of the requests at hand whose task was not planned for, from which on experts would be the wrong ones."""

MAX_SERVED_TASKS = 64
"""Tasks of which is told how well the residents serve them; clients may make up names."""

JUDGED_TOGETHER = 8
"""Prompts whose coverage is looked at in one go, which costs little more than one."""


class JudgedPrompt(NamedTuple):
    """How often a prompt wished for each expert, and the shares that prediction and frequency had expected."""

    counts: Int[np.ndarray, "M E"]
    predicted: Float[np.ndarray, "M E"]
    frequency: Float[np.ndarray, "M E"]
    own: bool
    """Whether the prediction was made for this prompt, and not for one before it."""


class ResidencyPlanner:
    """`begin` and `end` for every request, `admit` and `plan_for` those at hand before a step, `observe` after it.

    Of every `predict_every` prompts, in order of admission, the predictor is asked about the first, in the background
    and before the prompt starts; about all that run, too, when coverage drifts. A prompt is planned with its own
    prediction, else with its task's newest, and before that, or while the gate is closed, with its task's decayed
    frequency. Requests of tasks that no layer is sensitive to trigger nothing.

    With `one_forecast` the newest prediction serves all next prompts, whatever their task, and neither gate nor drift
    has a say: eMoE's own way.
    """

    def __init__(
        self,
        profile: TaskProfile,
        capacities: Sequence[int],
        predictor: Predictor | None = None,
        predict_every: PredictEvery = "auto",
        learns: bool = True,
        one_forecast: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        gate: Gate | None = None,
        drift: Drift | None = None,
    ):
        """Without `learns`, tasks keep their profiled frequencies for ever. `clock` (seconds) measures predictions.
        `gate` and `drift` are the usual ones where none is given."""
        self._profile, self._top_k, self._capacities = profile, profile.top_k, tuple(capacities)
        self._learns, self._one_forecast = learns, one_forecast
        self._frequencies = TaskFrequencies(profile)
        self.invocations = None if predictor is None else Invocations(predictor, predict_every, clock)
        """Which prompts the predictor is asked about; None without a predictor."""
        self.reads_tokens = isinstance(predictor, Predictor) and predictor.reads_tokens
        """Whether the predictor wants prompts' tokens."""
        self.gate, self.drift = gate or Gate(), drift or Drift()
        """Whether predictions count, and whether they still hold."""
        self.requests: dict[str, PlannedRequest] = {}
        """The requests that have begun and not ended, by id."""
        self._by_task: dict[str, Float[np.ndarray, "M E"]] = {}  # newest predictions
        self._newest: Float[np.ndarray, "M E"] | None = None  # of any task
        self._rivals: list[JudgedPrompt] = []  # of prompts that ended and were not judged yet
        self.planned: tuple[str, ...] = ()
        """Ids of the requests of the last plan."""
        self._planned_tasks: Counter[str] = Counter()
        self._stale = False  # whether what was planned with has changed

    @property
    def predicts(self) -> bool:
        """Whether it has a predictor, which wants prompts' embeddings."""
        return self.invocations is not None

    def use_capacities(self, capacities: Sequence[int]) -> None:
        """Layers have so many slots from now on."""
        self._capacities, self._stale = tuple(capacities), True

    def begin(
        self,
        request_id: str,
        task: str | None,
        prompt_tokens: int,
        max_tokens: int,
        embedding: Float[Array | np.ndarray, " d"] | None,
        tokens: Sequence[int] = (),
    ) -> None:
        """A request arrived; `embedding` is the mean of its prompt's input embeddings. `tokens` are the ids of the
        prompt's tokens, where the predictor reads them."""
        task = task or OTHER
        expected = min(self._profile.output_tokens(task, UNKNOWN_OUTPUT_TOKENS), max_tokens)
        sensitivity = self._profile.sensitivity(task)
        demand = Demand(prompt_tokens, expected, sensitivity, self._frequencies.of(task))
        self.requests[request_id] = PlannedRequest(task, embedding, demand, tokens)

    def admit(self, line: Iterable[str]) -> None:
        """These requests start now or next, in this order; those counted before are left out. Unknown ids are fine."""
        if self.invocations is None:
            return
        self._take_forecasts()
        if self.invocations.admit(self._known(line)):
            self.drift.restart()

    def await_forecasts(self, request_ids: Iterable[str], seconds: float) -> None:
        """Wait until these requests are predicted, as far as they were asked about and predictions count."""
        if self.invocations is not None and self._counts:
            self.invocations.wait(self._known(request_ids), seconds)

    def end(self, request_id: str, counts: Int[np.ndarray, "M E"] | None) -> None:
        """A request ended, its tokens having wished for experts so often. Unknown ids are fine."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return
        if counts is None or not counts.any():
            if self.invocations is not None:
                self.invocations.never_started(request)
            return
        request.counts = counts
        if self.invocations is not None:
            self.invocations.cadence.ended()
        if not request.unanswered:  # else it is learned from once it is predicted: that must not know the end
            self._learn(request)

    def computed(self, seconds: float) -> None:
        """The device computed for so long."""
        if self.invocations is not None:
            self.invocations.cadence.computed(seconds)

    def observe(self, wishes: int, covered: int, steps: int = 1) -> None:
        """Wishes of the last `steps` steps, and how many of them were resident."""
        self.drift.observe(wishes, covered, steps)
        if self.drift.drifted and self.invocations is not None and self.gate.is_open and not self._one_forecast:
            self.invocations.ask_early(self._known(self.planned))
            self.drift.restart()

    def is_urgent(self, request_ids: Iterable[str]) -> bool:
        """Whether these requests are of other tasks than those planned for, `URGENT` of them or more."""
        tasks = self._tasks(request_ids)
        now, before = tasks.total(), self._planned_tasks.total()
        if not now or not before:
            return now > 0
        either = tasks.keys() | self._planned_tasks.keys()
        return sum(abs(tasks[task] / now - self._planned_tasks[task] / before) for task in either) >= 2 * URGENT

    def plan_for(self, at_hand: Mapping[str, RequestProgress]) -> ExpectedWishes | None:
        """What these requests are expected to wish for, by what they have still to do.

        None while they are the requests of the last call, or where none of them is known.
        """
        self._take_forecasts()
        wanted = tuple(request_id for request_id in at_hand if request_id in self.requests)
        if not wanted or (wanted == self.planned and not self._stale):
            return None
        before = set(self.planned)
        requests = self._known(wanted)
        demands = [dataclasses.replace(request.demand, shares=self._shares(request)) for request in requests]
        left = [demand.tokens_left(at_hand[id]) for id, demand in zip(wanted, demands, strict=True)]
        tokens = np.array(left, float)
        is_new = np.array([request_id not in before for request_id in wanted])
        rates = expected_rates(demands, tokens, self._top_k)
        joined = np.zeros_like(rates)
        if is_new.any():
            joined = expected_rates(list(itertools.compress(demands, is_new)), tokens[is_new], self._top_k)
        continuing = len(before.intersection(wanted)) / len(before) if before else 0.0
        self.planned, self._planned_tasks, self._stale = wanted, self._tasks(wanted), False
        self.drift.promise(self._promised(rates))
        return ExpectedWishes(rates, joined, continuing, mean_sensitivity(demands, tokens))

    def serves(self, resident: Bool[np.ndarray, "M E"]) -> dict[str, float]:
        """By task, the share of its routing that these residents are expected to cover, by decayed frequency."""
        tasks = self._frequencies.tasks[:MAX_SERVED_TASKS]
        return {task: round(expected_coverage(self._frequencies.of(task), resident), 6) for task in tasks}

    def state(self) -> dict[str, Any]:
        """Prediction as JSON-able values."""
        self._take_forecasts()
        return {
            "predictor": self.predicts,
            "open": self.predicts and self.gate.is_open,
            "error": self.invocations.error if self.invocations is not None else None,
            "coverage_predicted": _number(self.gate.predicted),
            "coverage_frequency": _number(self.gate.frequency),
            "coverage_promised": _number(self.drift.promised),
            "coverage_recent": _number(self.drift.coverage),
            **(self.invocations.state() if self.invocations is not None else {}),
        }

    def warm_up(self) -> None:
        """Compile the predictor, so that no prediction waits for the compiler."""
        if self.invocations is not None:
            self.invocations.forecaster.warm_up()

    def close(self) -> None:
        """Join the predictor's thread."""
        if self.invocations is not None:
            self.invocations.forecaster.close()

    @property
    def _counts(self) -> bool:
        """Whether plans go by predictions."""
        return self._one_forecast or self.gate.is_open

    def _known(self, request_ids: Iterable[str]) -> list[PlannedRequest]:
        return [self.requests[request_id] for request_id in request_ids if request_id in self.requests]

    def _tasks(self, request_ids: Iterable[str]) -> Counter[str]:
        return Counter(request.task for request in self._known(request_ids))

    def _shares(self, request: PlannedRequest) -> Float[np.ndarray, "M E"]:
        """What a request is planned with."""
        predicted = self.forecast_of(request) if self._counts else None
        return self._frequencies.of(request.task) if predicted is None else predicted

    def forecast_of(self, request: PlannedRequest) -> Float[np.ndarray, "M E"] | None:
        """The prediction that serves a request: its own, or one made for a prompt before it."""
        if self._one_forecast:
            return self._newest
        return self._by_task.get(request.task) if request.predicted is None else request.predicted

    def _take_forecasts(self) -> None:
        if self.invocations is None:
            return
        tasks: set[str] = set()
        for request, shares in self.invocations.take():
            self._newest = self._by_task[request.task] = shares
            tasks.add(request.task)
            if request.counts is not None:
                self._learn(request)
        for request in self.invocations.given_up():
            if request.counts is not None:
                self._learn(request)
        if tasks and self._counts:
            self._stale |= self._one_forecast or any(one.task in tasks for one in self._known(self.planned))

    def _learn(self, request: PlannedRequest) -> None:
        """Judge the prediction that served a request that has ended, then learn from how it was routed."""
        if not self._learns:
            return
        assert request.counts is not None
        if self.invocations is not None:
            self.invocations.tell(request)
            predicted = self.forecast_of(request)
            if predicted is not None:
                frequency, own = self._frequencies.of(request.task), request.predicted is not None
                self._rivals.append(JudgedPrompt(request.counts, predicted, frequency, own))
                if len(self._rivals) == JUDGED_TOGETHER:
                    self._judge()
        self._frequencies.observe(request.task, request.counts)

    def _judge(self) -> None:
        """Have the gate see what prediction and frequency would have covered of prompts that ended."""
        assert self.invocations is not None
        counts, *rivals = (np.stack(field) for field in list(zip(*self._rivals, strict=True))[:3])
        covered = [coverage(counts, shares, self._capacities).tolist() for shares in rivals]
        for predicted, frequency, rival in zip(*covered, self._rivals, strict=True):
            self.gate.observe(predicted, frequency)
            if rival.own:
                self.invocations.cadence.judged(predicted - frequency)
        self._rivals = []

    def _promised(self, rates: Float[np.ndarray, "M E"]) -> float:
        """Coverage if wishes were as planned and the best experts resident."""
        return float(coverage(rates, rates, self._capacities))


def _number(value: float | None) -> float | None:
    """A JSON number, or None for what is not known."""
    return None if value is None or math.isnan(value) else round(value, 6)
