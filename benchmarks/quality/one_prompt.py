"""What answers lose when the experts of one prompt serve the next p prompts, as the eMoE paper measured it (Fig. 10).

Requests are served one at a time. Of every p + 1 requests, the first one's own routing decides which experts are
resident, and these stay until the last one has been answered. With p = 0 every request has its own experts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int

from benchmarks.quality.measure import Measured, Start, Traffic, measured
from benchmarks.quality.served import Cell, config_of, outcomes
from benchmarks.quality.traffic import in_bursts
from emoe_jax import Engine
from emoe_jax.engine.loading import load_parts
from emoe_jax.predictor import Predictor
from emoe_jax.predictor.prompts import frequencies
from emoe_jax.residency.planner import ResidencyPlanner
from emoe_jax.tasks import TaskProfile

POLICY = "emoe-paper"
_WAIT_MS = 60_000.0  # a prompt waits for its experts, so that none is answered with those of the prompt before


class RoutingBook:
    """Stands for a predictor: notes how prompts were routed, and later says it of each as if it were a prediction."""

    def __init__(self, num_layers: int, num_experts: int, noted: Sequence[Int[np.ndarray, "M E"]] = ()):
        """`noted` are the counts of prompts that it knows; it expects them again, in this order."""
        self.counts: list[Int[np.ndarray, "M E"]] = []
        """Of the prompts that were answered."""
        self.num_unlearned = 0
        self._noted = noted
        self._unknown = np.full((num_layers, num_experts), 1 / num_experts, np.float32)

    def observe(self, task: str, counts: Int[np.ndarray, "M E"], embedding: Float[np.ndarray, " d"] | None) -> None:
        """A prompt was answered."""
        del task, embedding
        self.counts.append(counts)

    def predict_next(self, asked: Sequence[Any], rows: int) -> list[Float[np.ndarray, "M E"]]:
        """The shares of the experts in the prompt that is next, or of all alike where it is not known."""
        del rows
        number = len(self.counts)
        shares = frequencies(self._noted[number]) if number < len(self._noted) else self._unknown
        return [shares for _ in asked]


def served_by_one(
    model: str, periods: Sequence[int], share: float, traffic: Traffic, seed: int, start: Start
) -> Iterator[tuple[int, Measured]]:
    """Each of `periods` with its rows, after a run with all experts resident that they are compared with."""
    stream = in_bursts(traffic.items, seed)
    asked = sum(1 if item.answer is None else 2 for item in stream)
    tell = start("all experts resident, one request at a time", asked)
    with _engine(model, 1.0, traffic.context, seed, 1) as (engine, book):
        reference = outcomes(engine, stream, 1, tell, waiting=0)
    for period in periods:
        began = time.monotonic()
        tell = start(f"one prompt's experts for {period} more, {share:.0%} resident", asked)
        with _engine(model, share, traffic.context, seed, period + 1, book.counts) as (engine, _):
            found = outcomes(engine, stream, 1, tell, waiting=0)
            state = engine.state()
        cell = Cell(POLICY, "resident", share)
        yield period, measured(cell, stream, [found], reference, seed, began, state)


@contextlib.contextmanager
def _engine(
    model: str, share: float, context: int, seed: int, every: int, noted: Sequence[Int[np.ndarray, "M E"]] = ()
) -> Iterator[tuple[Engine, RoutingBook]]:
    """An engine that asks a book about every so many-th request."""
    cell = Cell(POLICY, "resident", share, (("load_wait_ms", _WAIT_MS),))
    parts = load_parts(model, config_of(cell, context, 1, seed))
    if parts.planner is not None:
        parts.planner.close()
    # Without a profile no layer counts as insensitive: the paper's figure loads the experts of all layers.
    profile = TaskProfile.empty(parts.runner.config)
    book = RoutingBook(profile.num_layers, profile.num_experts, noted)
    planner = ResidencyPlanner(profile, parts.memory.capacities, cast(Predictor, book), every, one_forecast=True)
    with Engine(dataclasses.replace(parts, planner=planner, profile=None)) as engine:
        engine.warm_up()
        yield engine, book
