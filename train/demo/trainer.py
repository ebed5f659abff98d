"""The training loop: AdamW, Orbax checkpoints, resuming where a killed run stopped."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tokenizers import Tokenizer

from emoe_jax.config import ModelConfig
from train.checkpoints import Checkpoints
from train.demo import batches, objective
from train.demo.batches import Batch, Encoder, Recipe
from train.demo.objective import Metrics, Parameters


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Everything that decides the outcome of a run. A step takes `rows` sequences of `length` tokens; every
    `long_every`-th takes fewer sequences, four times as long, of which each is one document."""

    steps: int
    seed: int = 0
    rows: int = 32
    length: int = 128
    long_every: int = 10
    loss_positions: int = 2304
    peak_rate: float = 1.2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    checkpoint_every: int = 100
    expert_dropout: float = 0.0  # share of rows that get by with part of the experts
    concentration: float = 0.0  # weight of the loss that draws a group of text to few experts

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.seed, self.steps, self.loss_positions, self.expert_dropout)


class TrainState(NamedTuple):
    """What a checkpoint holds: steps done, parameters, optimizer state."""

    step: jax.Array
    parameters: Parameters
    optimizer: Any


_SAVE_SECONDS = 150  # a killed run loses at most so much work, however slow its steps
_PLATEAU = 0.55  # share of the steps until which the rate stays highest
_LOW = 0.02  # of the highest rate: where it ends


def learning_rate(plan: Hyperparameters) -> optax.Schedule:
    """A rise, a plateau and a straight line down."""
    rise = min(plan.warmup_steps, max(1, plan.steps // 4))
    hold = max(rise, int(_PLATEAU * plan.steps))
    parts = [
        optax.linear_schedule(0.0, plan.peak_rate, rise),
        optax.constant_schedule(plan.peak_rate),
        optax.linear_schedule(plan.peak_rate, _LOW * plan.peak_rate, max(1, plan.steps - hold)),
    ]
    return optax.join_schedules(parts, [rise, hold])


def optimizer(plan: Hyperparameters) -> optax.GradientTransformation:
    def decayed(parameters: Parameters) -> Parameters:
        dense = {name: leaf.ndim > 1 and name != "embedding" for name, leaf in parameters.dense.items()}
        return Parameters(dense, jax.tree.map(lambda _: True, parameters.experts))  # pyright: ignore[reportArgumentType]

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rate(plan), b1=0.9, b2=0.98, weight_decay=plan.weight_decay, mask=decayed),
    )


def start(config: ModelConfig, plan: Hyperparameters) -> TrainState:
    parameters = objective.init(config, plan.seed)
    return TrainState(jnp.int32(0), parameters, optimizer(plan).init(parameters))  # pyright: ignore[reportArgumentType]


@functools.partial(jax.jit, static_argnames=("config", "plan"), donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, config: ModelConfig, plan: Hyperparameters
) -> tuple[TrainState, Metrics]:
    """One update. Donates `state`."""
    (_, metrics), gradients = jax.value_and_grad(objective.loss, has_aux=True)(
        state.parameters, batch, config, plan.expert_dropout > 0, plan.concentration
    )
    # optax types its trees as nests of containers and arrays, which a NamedTuple is only at run time.
    before: Any = state.parameters
    updates, moments = optimizer(plan).update(gradients, state.optimizer, before)
    after: Any = optax.apply_updates(before, updates)
    return TrainState(state.step + 1, after, moments), metrics


def run(
    config: ModelConfig,
    plan: Hyperparameters,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints | None,
    report: Callable[[int, Metrics], None],
    stop_after: int | None = None,
) -> TrainState:
    """Train up to `plan.steps`, from the newest checkpoint if there is one; `report` gets every step's metrics.

    `stop_after` ends the run early without changing the schedule, as a kill would. A batch is made while a step runs.
    """
    state = start(config, plan)
    state = checkpoints.restore(state) if checkpoints else state
    encoder = Encoder(tokenizer)
    first, last = int(state.step), min(plan.steps, stop_after or plan.steps)

    def batch_of(step: int) -> Batch:
        joined = step % plan.long_every == plan.long_every - 1
        rows, length = (plan.rows // 4, plan.length * 4) if joined else (plan.rows, plan.length)
        return batches.make(encoder, config, plan.recipe, step, rows, length, joined)

    saved = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        coming = worker.submit(batch_of, first)
        for step in range(first, last):
            batch = coming.result()
            if step + 1 < last:
                coming = worker.submit(batch_of, step + 1)
            state, metrics = train_step(state, batch, config, plan)
            report(step + 1, metrics)
            due = (step + 1) % plan.checkpoint_every == 0 or time.monotonic() - saved > _SAVE_SECONDS
            if checkpoints and (due or step + 1 == last):
                checkpoints.save(state)
                saved = time.monotonic()
    return state
