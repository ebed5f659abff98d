"""The training loop: AdamW in cycles of the rate, Orbax checkpoints, resuming where a killed run stopped."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tokenizers import Tokenizer

from emoe_jax.config import ModelConfig
from train.checkpoints import Checkpoints
from train.demo import batches, objective
from train.demo.batches import Batch, Encoder
from train.demo.objective import Metrics, Parameters


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the outcome of a run. A step takes `rows` sequences of `length` tokens; every
    `long_every`-th takes fewer sequences, four times as long, of which each is one conversation."""

    steps: int
    seed: int = 0
    rows: int = 32
    length: int = 128
    long_every: int = 10
    loss_positions: int = 1024
    peak_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    checkpoint_every: int = 200


class TrainState(NamedTuple):
    """What a checkpoint holds: steps done, parameters, optimizer state."""

    step: jax.Array
    parameters: Parameters
    optimizer: Any


class Cycle(NamedTuple):
    """Part of a run: its share of the steps, its peak over the highest rate, and the part of it spent at the peak."""

    share: float
    peak: float
    plateau: float


CYCLES = (Cycle(43 / 52, 1.0, 0.6), Cycle(9 / 52, 0.4, 0.0))
_LOW = 0.02  # of the highest rate: where every cycle ends


def learning_rate(plan: Plan) -> optax.Schedule:
    """Cycles of a rise, a plateau and a straight line down. Of 5200 steps: 4300 and 900."""
    low, schedules, ends = _LOW * plan.peak_rate, [], [0]
    for index, cycle in enumerate(CYCLES):
        steps = max(4, round(cycle.share * plan.steps))
        rise = min(plan.warmup_steps if index == 0 else plan.warmup_steps // 2, steps // 4)
        hold, peak, start = max(rise, int(cycle.plateau * steps)), cycle.peak * plan.peak_rate, ends[-1]
        schedules += [
            optax.linear_schedule(low if index else 0.0, peak, rise),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, low, steps - hold),
        ]
        ends += [start + rise, start + hold, start + steps]
    return optax.join_schedules(schedules, ends[1:-1])


def optimizer(plan: Plan) -> optax.GradientTransformation:

    def decayed(parameters: Parameters) -> Parameters:
        dense = {name: leaf.ndim > 1 and name != "embedding" for name, leaf in parameters.dense.items()}
        return Parameters(dense, jax.tree.map(lambda _: True, parameters.experts))  # pyright: ignore[reportArgumentType]

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rate(plan), b1=0.9, b2=0.98, weight_decay=plan.weight_decay, mask=decayed),
    )


def start(config: ModelConfig, plan: Plan) -> TrainState:
    parameters = objective.init(config, plan.seed)
    return TrainState(jnp.int32(0), parameters, optimizer(plan).init(parameters))  # pyright: ignore[reportArgumentType]


@functools.partial(jax.jit, static_argnames=("config", "plan"), donate_argnames="state")
def train_step(state: TrainState, batch: Batch, config: ModelConfig, plan: Plan) -> tuple[TrainState, Metrics]:
    """One update. Donates `state`."""
    (_, metrics), gradients = jax.value_and_grad(objective.loss, has_aux=True)(state.parameters, batch, config)
    # optax types its trees as nests of containers and arrays, which a NamedTuple is only at run time.
    before: Any = state.parameters
    updates, moments = optimizer(plan).update(gradients, state.optimizer, before)
    after: Any = optax.apply_updates(before, updates)
    return TrainState(state.step + 1, after, moments), metrics


def run(
    config: ModelConfig,
    plan: Plan,
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
        return batches.make(encoder, config, plan.seed, step, rows, length, plan.loss_positions, joined)

    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        coming = worker.submit(batch_of, first)
        for step in range(first, last):
            batch = coming.result()
            if step + 1 < last:
                coming = worker.submit(batch_of, step + 1)
            state, metrics = train_step(state, batch, config, plan)
            report(step + 1, metrics)
            if checkpoints and ((step + 1) % plan.checkpoint_every == 0 or step + 1 == last):
                checkpoints.save(state)
    return state
