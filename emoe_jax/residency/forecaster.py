"""The predictor on a thread of its own: no step that has something else to do waits for a prediction."""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from emoe_jax.predictor import Predictor
from emoe_jax.tasks import OTHER

REFIT_EVERY = 128
"""Finished prompts after which the predictor's prior may learn from them."""

BATCHES = (4, 16)
"""Prompts that a call of the predictor computes, the fewest that hold those asked about: one compilation each."""

LEARNING_SHARE = 0.01
"""Of the time that passes: the most that learning may take, a second being assumed for the first."""


class Question(NamedTuple):
    """A prompt whose routing is to be predicted. No two have the same number."""

    number: int
    task: str
    embedding: Float[Array | np.ndarray, " d"] | None
    tokens: Sequence[int] = ()
    """The prompt's token ids, where the predictor reads them."""


class Finished(NamedTuple):
    """A prompt that has run, and how often it wished for each expert."""

    task: str
    embedding: Float[Array | np.ndarray, " d"] | None
    counts: Int[np.ndarray, "M E"]


class Forecast(NamedTuple):
    """Shares by question number from one call of the predictor, and the seconds that it took."""

    shares: dict[int, Float[np.ndarray, "M E"]]
    seconds: float


class Forecaster:
    """`ask` about prompts, `poll` for the answers, and `tell` it of prompts that have run: for the owner of the step.

    Questions wait in a queue. The thread takes as many at once as there are, up to the largest of `BATCHES`. What goes
    wrong in the predictor ends it: `error` says what, and nothing is predicted any more.
    """

    def __init__(
        self,
        predictor: Predictor,
        refit_every: int = REFIT_EVERY,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """`clock` (seconds) measures calls of the predictor, and says when it may learn again."""
        self.error: str | None = None
        self.seconds = 0.0
        """Seconds that the thread has spent so far, predicting and learning."""
        self._predictor = predictor
        self.refit_every = refit_every
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="expert-predictor")
        self._job: Future[None] | None = None
        self._changed = threading.Condition()  # guards all below
        self._questions: dict[int, Question] = {}  # not taken by the thread yet
        self._unanswered: set[int] = set()
        self._finished: list[Finished] = []
        self._answers: deque[Forecast] = deque()
        self._working = False
        self._learn_after = clock() + 1 / LEARNING_SHARE

    def warm_up(self) -> None:
        """Compile what predictions run; waits for it."""
        for rows in BATCHES:
            self.ask([Question(-1 - row, OTHER, None) for row in range(rows)])
            self.join()
            self.poll()

    def tell(self, finished: Finished) -> None:
        """The predictor learns from this prompt before it answers a question that is asked after it."""
        with self._changed:
            self._finished.append(finished)

    def ask(self, questions: Sequence[Question]) -> None:
        """Queue questions."""
        with self._changed:
            if self.error is not None or not questions:
                return
            self._questions |= {question.number: question for question in questions}
            self._unanswered.update(self._questions)
            if not self._working:
                self._working = True
                self._job = self._thread.submit(self._work)

    def withdraw(self, number: int) -> bool:
        """Take back a question. False where the predictor has seen it already."""
        with self._changed:
            if self._questions.pop(number, None) is None:
                return False
            self._unanswered.discard(number)
            return True

    def poll(self) -> list[Forecast]:
        """The answers since the last call, in the order of the questions."""
        with self._changed:
            answers, self._answers = [*self._answers], deque()
            return answers

    def wait(self, numbers: Collection[int], seconds: float) -> None:
        """Until these questions are answered, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._unanswered.isdisjoint(numbers), seconds)

    def join(self) -> None:
        """Until every question is answered and the thread rests."""
        if self._job is not None:
            self._job.result()

    def close(self) -> None:
        """Drop the questions that were not taken yet and end the thread."""
        with self._changed:
            self._unanswered.difference_update(self._questions)
            self._questions = {}
        self._thread.shutdown(wait=True)

    def _work(self) -> None:
        """Answer what is asked until there is nothing more."""
        while True:
            with self._changed:
                taken = [self._questions[number] for number in [*self._questions][: BATCHES[-1]]]
                if not taken:
                    self._working = False
                    return
                for question in taken:
                    del self._questions[question.number]
                finished, self._finished = self._finished, []
            try:
                self._answer(finished, taken)
                self._learn()
            except Exception as error:
                with self._changed:
                    self.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
                    self._questions, self._unanswered, self._working = {}, set(), False
                    self._changed.notify_all()
                return

    def _answer(self, finished: Iterable[Finished], questions: Sequence[Question]) -> None:
        began = self._clock()
        for prompt in finished:
            self._predictor.observe(prompt.task, prompt.counts, prompt.embedding)
        asked = [(question.task, question.embedding) for question in questions]
        rows = next(rows for rows in BATCHES if rows >= len(asked))
        if any(question.tokens for question in questions):
            answers = self._predictor.predict_next(asked, rows, [question.tokens for question in questions])
        else:
            answers = self._predictor.predict_next(asked, rows)
        numbers = [question.number for question in questions]
        seconds = self._clock() - began
        with self._changed:
            self._answers.append(Forecast(dict(zip(numbers, answers, strict=True)), seconds))
            self._unanswered.difference_update(numbers)
            self.seconds += seconds
            self._changed.notify_all()

    def _learn(self) -> None:
        """Refit the prior, rarely. Questions that were not in this batch wait for it."""
        if self._predictor.num_unlearned < self.refit_every or self._clock() < self._learn_after:
            return
        began = self._clock()
        self._predictor.refit()
        ended = self._clock()
        self._learn_after = ended + (ended - began) / LEARNING_SHARE
        self.seconds += ended - began
