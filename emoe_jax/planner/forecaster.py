"""The predictor on a thread of its own: no step ever waits for a prediction."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from emoe_jax.predictor import Predictor
from emoe_jax.tasks import OTHER

REFIT_EVERY = 128
"""Finished prompts after which the predictor's prior may learn from them."""

MOST_QUESTIONS = 16
"""Prompts predicted at once; always so many are computed, so that one shape is compiled."""

LEARNING_SHARE = 0.01
"""Of the time that passes: the most that learning may take, a second being assumed for the first."""


class Question(NamedTuple):
    """A prompt whose routing is to be predicted."""

    request_id: str
    task: str
    embedding: Float[np.ndarray, " d"] | None


class Finished(NamedTuple):
    """A prompt that has run, and how often it wished for each expert."""

    task: str
    embedding: Float[np.ndarray, " d"] | None
    counts: Int[np.ndarray, "M E"]


class Forecast(NamedTuple):
    """Answers by request id, and the seconds of the thread that they took."""

    shares: dict[str, Float[np.ndarray, "M E"]]
    seconds: float


class Forecaster:
    """One prediction at a time: `submit`, then `poll` until it is there. Owned by whoever owns the step.

    What goes wrong in the predictor ends it: `error` says what, and nothing is predicted any more.
    """

    def __init__(self, predictor: Predictor, refit_every: int = REFIT_EVERY):
        self.error: str | None = None
        self._predictor = predictor
        self._refit_every = refit_every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="expert-predictor")
        self._job: Future[Forecast] | None = None
        self._learn_after = time.monotonic() + 1 / LEARNING_SHARE

    def warm_up(self) -> None:
        """Compile what a prediction runs; waits for it."""
        self.submit((), [Question("", OTHER, None)])
        wait([self._job] if self._job else [])
        self.poll()

    @property
    def busy(self) -> bool:
        return self._job is not None

    def submit(self, finished: Sequence[Finished], questions: Sequence[Question]) -> None:
        """Learn from finished prompts, in order of arrival, then answer at most `MOST_QUESTIONS`. Not while `busy`."""
        assert self._job is None
        assert len(questions) <= MOST_QUESTIONS
        if self.error is None:
            self._job = self._thread.submit(self._run, tuple(finished), tuple(questions))

    def poll(self) -> Forecast | None:
        """The answers to what was submitted last, once; None while there are none."""
        if self._job is None or not self._job.done():
            return None
        job, self._job = self._job, None
        try:
            return job.result()
        except Exception as error:
            self.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return None

    def close(self) -> None:
        """Wait for the prediction under way and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, finished: Sequence[Finished], questions: Sequence[Question]) -> Forecast:
        began = time.perf_counter()
        for prompt in finished:
            self._predictor.observe(prompt.task, prompt.counts, prompt.embedding)
        if self._predictor.num_unlearned >= self._refit_every and time.monotonic() >= self._learn_after:
            before = time.monotonic()
            self._predictor.refit()
            after = time.monotonic()
            self._learn_after = after + (after - before) / LEARNING_SHARE
        shares = {}
        if questions:
            asked = [(question.task, question.embedding) for question in questions]
            answers = self._predictor.predict_next(asked, MOST_QUESTIONS)
            shares = {question.request_id: answer for question, answer in zip(questions, answers, strict=True)}
        return Forecast(shares, time.perf_counter() - began)
