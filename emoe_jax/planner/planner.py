"""`ResidencyPlanner`: watches requests come, run and end, and says what the resident experts should be planned for."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from emoe_jax.errors import ConfigError
from emoe_jax.planner.demand import Demand, Progress, expected_rates, mean_sensitivity
from emoe_jax.planner.forecaster import MOST_QUESTIONS, Finished, Forecaster, Question
from emoe_jax.planner.frequencies import TaskFrequencies
from emoe_jax.planner.judges import Drift, Gate, coverage
from emoe_jax.predictor import Predictor
from emoe_jax.tasks import OTHER, TaskProfile

UNKNOWN_OUTPUT_TOKENS = 64.0
"""Expected answer length where no task was profiled."""

URGENT = 0.25
"""Share of the requests at hand whose task was not planned for, from which on experts would be the wrong ones."""

PROBE_EVERY = 4
"""A predictor whose gate is closed is asked so many times more rarely, only to see whether it has become better."""

JUDGED_TOGETHER = 8
"""Prompts whose coverage is looked at in one go, which costs little more than one."""


class Plan(NamedTuple):
    """Arguments of `Residency.plan`."""

    rates: Float[np.ndarray, "M E"]
    joined: Float[np.ndarray, "M E"]
    kept: float
    sensitivity: Float[np.ndarray, " M"]


class Rivals(NamedTuple):
    """How often a prompt wished for each expert, and the shares that prediction and frequency had expected."""

    counts: Int[np.ndarray, "M E"]
    predicted: Float[np.ndarray, "M E"]
    frequency: Float[np.ndarray, "M E"]


@dataclasses.dataclass
class _Request:
    task: str
    embedding: Float[np.ndarray, " d"] | None
    demand: Demand
    predicted: Float[np.ndarray, "M E"] | None = None
    """What the predictor said of this prompt, whether or not the gate lets it count."""


class ResidencyPlanner:
    """`begin` and `end` for every request, `plan_for` the running ones before a step, `observe` after it.

    Every `predict_every` prompts, or earlier on drift, the predictor is asked about all requests at hand, in the
    background; a task's newest prediction serves its next prompts until then. Before that, and while the gate is
    closed, a task's decayed frequency serves. Requests of tasks that no layer is sensitive to trigger nothing.
    """

    def __init__(
        self,
        profile: TaskProfile,
        capacities: Sequence[int],
        predictor: Predictor | None = None,
        predict_every: int = 40,
        learns: bool = True,
    ):
        """Without `learns`, tasks keep their profiled frequencies for ever. Raises `ConfigError` for `predict_every`
        below 1."""
        if predict_every < 1:
            raise ConfigError(f"predict_every is {predict_every}; predictions can be made every 1 or more prompts")
        self._profile, self._top_k, self._capacities = profile, profile.top_k, tuple(capacities)
        self._every, self._learns = predict_every, learns
        self._frequencies = TaskFrequencies(profile)
        self._forecaster = None if predictor is None else Forecaster(predictor)
        self._gate, self._drift = Gate(), Drift()
        self._requests: dict[str, _Request] = {}
        self._by_task: dict[str, Float[np.ndarray, "M E"]] = {}  # newest predictions
        self._finished: list[Finished] = []
        self._rivals: list[Rivals] = []  # of prompts that ended and were not judged yet
        self._planned: tuple[str, ...] = ()
        self._planned_tasks: Counter[str] = Counter()
        self._stale = False  # whether what was planned with has changed
        self._since = 0  # prompts since the last prediction was asked for
        self._predictions = self._early = 0
        self._seconds = 0.0

    @property
    def predicts(self) -> bool:
        """Whether it has a predictor, which wants prompts' embeddings."""
        return self._forecaster is not None

    def use_capacities(self, capacities: Sequence[int]) -> None:
        """Layers have so many slots from now on."""
        self._capacities, self._stale = tuple(capacities), True

    def begin(
        self,
        request_id: str,
        task: str | None,
        prompt_tokens: int,
        max_tokens: int,
        embedding: Float[np.ndarray, " d"] | None,
    ) -> None:
        """A request arrived; `embedding` is the mean of its prompt's input embeddings."""
        task = task or OTHER
        expected = min(self._profile.output_tokens(task, UNKNOWN_OUTPUT_TOKENS), max_tokens)
        sensitivity = self._profile.sensitivity(task)
        demand = Demand(prompt_tokens, expected, sensitivity, self._shares(task))
        self._requests[request_id] = _Request(task, embedding, demand)
        self._since += int(sensitivity.any())
        self._ask_when_due()

    def end(self, request_id: str, counts: Int[np.ndarray, "M E"] | None) -> None:
        """A request ended, its tokens having wished for experts so often. Unknown ids are fine."""
        request = self._requests.pop(request_id, None)
        if request is None or counts is None or not counts.any() or not self._learns:
            return
        if self._forecaster is not None:
            self._finished.append(Finished(request.task, request.embedding, counts))
            predicted = request.predicted if request.predicted is not None else self._by_task.get(request.task)
            if predicted is not None:
                self._rivals.append(Rivals(counts, predicted, self._frequencies.of(request.task)))
                if len(self._rivals) == JUDGED_TOGETHER:
                    self._judge()
        self._frequencies.observe(request.task, counts)

    def observe(self, wishes: int, covered: int, steps: int = 1) -> None:
        """Wishes of the last `steps` steps, and how many of them were resident."""
        self._drift.observe(wishes, covered, steps)
        if self._drift.drifted and self._forecaster is not None and not self._forecaster.busy and self._gate.is_open:
            self._early += 1
            self._ask()

    def is_urgent(self, request_ids: Iterable[str]) -> bool:
        """Whether these requests are of other tasks than those planned for, `URGENT` of them or more."""
        tasks = self._tasks(request_ids)
        now, before = tasks.total(), self._planned_tasks.total()
        if not now or not before:
            return now > 0
        either = tasks.keys() | self._planned_tasks.keys()
        return sum(abs(tasks[task] / now - self._planned_tasks[task] / before) for task in either) >= 2 * URGENT

    def plan_for(self, at_hand: Mapping[str, Progress]) -> Plan | None:
        """The plan for these requests, by what they have still to do; None while they are those that it was made for,
        or where none of them is known.
        """
        self._take_forecast()
        wanted = tuple(request_id for request_id in at_hand if request_id in self._requests)
        if not wanted or (wanted == self._planned and not self._stale):
            return None
        before = set(self._planned)
        demands = [self._requests[request_id].demand for request_id in wanted]
        tokens = np.array([demand.tokens_left(at_hand[id]) for id, demand in zip(wanted, demands, strict=True)])
        is_new = np.array([request_id not in before for request_id in wanted])
        rates = expected_rates(demands, tokens, self._top_k)
        joined = np.zeros_like(rates)
        if is_new.any():
            joined = expected_rates(list(itertools.compress(demands, is_new)), tokens[is_new], self._top_k)
        kept = len(before.intersection(wanted)) / len(before) if before else 0.0
        self._planned, self._planned_tasks, self._stale = wanted, self._tasks(wanted), False
        self._drift.promise(self._promised(rates))
        return Plan(rates, joined, kept, mean_sensitivity(demands, tokens))

    def state(self) -> dict[str, Any]:
        """Prediction as JSON-able values."""
        return {
            "predictor": self.predicts,
            "open": self.predicts and self._gate.is_open,
            "predict_every": self._every,
            "prompts_since": self._since,
            "predictions": self._predictions,
            "early_predictions": self._early,
            "seconds": round(self._seconds, 6),
            "coverage_predicted": _number(self._gate.predicted),
            "coverage_frequency": _number(self._gate.frequency),
            "coverage_promised": _number(self._drift.promised),
            "coverage_recent": _number(self._drift.coverage),
            "error": self._forecaster.error if self._forecaster is not None else None,
        }

    def warm_up(self) -> None:
        """Compile the predictor, so that no prediction waits for the compiler."""
        if self._forecaster is not None:
            self._forecaster.warm_up()

    def close(self) -> None:
        """Join the predictor's thread."""
        if self._forecaster is not None:
            self._forecaster.close()

    def _tasks(self, request_ids: Iterable[str]) -> Counter[str]:
        requests = self._requests
        return Counter(requests[request_id].task for request_id in request_ids if request_id in requests)

    def _shares(self, task: str) -> Float[np.ndarray, "M E"]:
        """What a prompt of the task is planned with until it is predicted itself."""
        if self._gate.is_open and task in self._by_task:
            return self._by_task[task]
        return self._frequencies.of(task)

    def _ask_when_due(self) -> None:
        every = self._every if self._gate.is_open else PROBE_EVERY * self._every
        if self._since >= every and self._forecaster is not None and not self._forecaster.busy:
            self._ask()

    def _ask(self) -> None:
        assert self._forecaster is not None
        questions = (
            Question(request_id, request.task, request.embedding)
            for request_id, request in self._requests.items()
            if request.predicted is None and request.demand.sensitivity.any()
        )
        self._forecaster.submit(self._finished, list(itertools.islice(questions, MOST_QUESTIONS)))
        self._finished, self._since = [], 0
        self._drift.restart()

    def _take_forecast(self) -> None:
        forecast = None if self._forecaster is None else self._forecaster.poll()
        if forecast is None:
            return
        self._predictions += 1
        self._seconds += forecast.seconds
        by_task: dict[str, list[np.ndarray]] = {}
        for request_id, shares in forecast.shares.items():
            request = self._requests.get(request_id)
            if request is not None:
                request.predicted = shares
                by_task.setdefault(request.task, []).append(shares)
                if self._gate.is_open:
                    request.demand = dataclasses.replace(request.demand, shares=shares)
                    self._stale |= request_id in self._planned
        self._by_task |= {task: np.mean(shares, axis=0) for task, shares in by_task.items()}
        self._ask_when_due()

    def _judge(self) -> None:
        """Have the gate see what prediction and frequency would have covered of prompts that ended."""
        counts, *rivals = (np.stack(field) for field in zip(*self._rivals, strict=True))
        for covered in zip(*(coverage(counts, shares, self._capacities).tolist() for shares in rivals), strict=True):
            self._gate.observe(*covered)
        self._rivals = []

    def _promised(self, rates: Float[np.ndarray, "M E"]) -> float:
        """Coverage if wishes were as planned and the best experts resident."""
        return float(coverage(rates, rates, self._capacities))


def _number(value: float | None) -> float | None:
    """A JSON number, or None for what is not known."""
    return None if value is None or math.isnan(value) else round(value, 6)
