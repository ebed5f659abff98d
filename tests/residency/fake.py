"""A small model's shape and routing, and a predictor that says what it is told to say, when it is let."""

import threading
from typing import Any

import numpy as np

M, E, K = 2, 8, 2
CAPACITIES = (4, 4)


def favouring(*experts: int) -> np.ndarray:
    """Shares, nine tenths of which go to these experts."""
    shares = np.full((M, E), 0.1 / E)
    shares[:, experts] += 0.9 / len(experts)
    return shares


class FakePredictor:
    """Says `answer` of every prompt, once `gate` is open; keeps what it was asked and told."""

    num_unlearned = 0

    def __init__(self, answer: np.ndarray | Exception, seconds: float = 0.0):
        """Each call takes so many seconds of `clock`."""
        self.answer = answer
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[str] = []
        self.batches: list[int] = []
        self.observed: list[str] = []
        self.seconds, self.now = seconds, 0.0

    def clock(self) -> float:
        return self.now

    def observe(self, task: str, counts: np.ndarray, embedding: Any = None) -> None:
        self.observed.append(task)

    def predict_next(self, prompts: list[tuple[str, Any]], rows: int) -> np.ndarray:
        assert self.gate.wait(10)
        assert len(prompts) <= rows
        self.now += self.seconds
        self.asked += [task for task, _ in prompts]
        self.batches.append(len(prompts))
        if isinstance(self.answer, Exception):
            raise self.answer
        return np.stack([self.answer] * len(prompts))
