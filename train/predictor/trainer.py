"""The training loop: AdamW over all members at once, averaged weights, the best kept, resumed after a kill."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from emoe_jax.errors import EmoeError
from emoe_jax.predictor import Predictor, PredictorConfig, network
from emoe_jax.predictor.model import Known
from emoe_jax.predictor.network import Sizes, Weights
from train.checkpoints import Checkpoints
from train.predictor import objective
from train.predictor.coverage import coverage_at
from train.predictor.examples import Examples
from train.predictor.objective import BUDGETS, Batch, Metrics


class DivergedError(EmoeError):
    """The loss is no longer a number."""


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Everything that decides the outcome of a run, besides the trace and the predictor's configuration."""

    steps: int
    seed: int = 0
    rows: int = 32
    peak_rate: float = 2e-3
    weight_decay: float = 0.3
    dropout: float = 0.5
    ranking: float = 1.0  # weight of the smooth coverage against cross entropy
    smoothing: float = 10.0  # assignments of the prior added to a prompt's own
    weight_power: float = 0.5  # a prompt weighs its assignments to this power
    average: float = 0.98  # decay of the averaged weights, which are what is judged and kept
    held_out: float = 0.12
    evaluate_every: int = 25
    checkpoint_every: int = 50
    shuffled: bool = False


class TrainState(NamedTuple):
    """What a checkpoint holds. `best` are the averaged weights that covered most of the held-out prompts."""

    step: jax.Array
    weights: Weights
    averaged: Weights
    optimizer: Any
    best: Weights
    best_coverage: jax.Array
    best_step: jax.Array


class StepReport(NamedTuple):
    """What is reported of a step: `coverage` of the held-out prompts, mean over the budgets, where it was measured."""

    step: int
    loss: float
    cross_entropy: float
    train_coverage: float
    coverage: float | None
    best_coverage: float
    best_step: int


def optimizer(plan: Hyperparameters) -> optax.GradientTransformation:
    warmup = max(1, plan.steps // 20)
    rate = optax.warmup_cosine_decay_schedule(
        plan.peak_rate / warmup, plan.peak_rate, warmup, max(plan.steps, warmup + 1), plan.peak_rate * 0.02
    )

    def decayed(weights: Any) -> Any:
        return {name: leaf.ndim > 1 and "bias" not in name and "norm" not in name for name, leaf in weights.items()}

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=plan.weight_decay, mask=decayed),
    )


def start(config: PredictorConfig, sizes: Sizes, plan: Hyperparameters) -> TrainState:
    weights = network.init(config, sizes, plan.seed)
    moments = jax.vmap(optimizer(plan).init)(weights)
    copy = functools.partial(jax.tree.map, jnp.copy)
    return TrainState(jnp.int32(0), weights, copy(weights), moments, copy(weights), jnp.float32(-1), jnp.int32(0))


@functools.partial(jax.jit, static_argnames=("config", "sizes", "plan"), donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, config: PredictorConfig, sizes: Sizes, plan: Hyperparameters
) -> tuple[TrainState, Metrics]:
    """One update of every member, each with its own dropout. Donates `state`."""
    # Dropout draws many numbers: "rbg" keys compile in half the time that the default ones take.
    key = jax.random.fold_in(jax.random.key(plan.seed, impl="rbg"), state.step)
    seen_key, member_key = jax.random.split(key)
    visible = objective.visible_layers(config, batch.given, seen_key)
    batch = batch._replace(known=batch.known._replace(visible=visible))

    def member(weights: Weights, moments: Any, key: jax.Array) -> tuple[Weights, Any, Metrics]:
        gradient = jax.grad(objective.loss, has_aux=True)
        gradients, metrics = gradient(weights, config, sizes, batch, key, plan.dropout, plan.ranking)
        updates, moments = optimizer(plan).update(gradients, moments, weights)
        return optax.apply_updates(weights, updates), moments, metrics  # pyright: ignore[reportReturnType]

    keys = jax.random.split(member_key, config.members)
    weights, moments, metrics = jax.vmap(member)(state.weights, state.optimizer, keys)
    # A young average follows faster, so that it does not remember the initial weights.
    decay = jnp.minimum(plan.average, (1 + state.step) / (10 + state.step))
    averaged = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.averaged, weights)
    state = state._replace(step=state.step + 1, weights=weights, averaged=averaged, optimizer=moments)
    return state, jax.tree.map(jnp.mean, metrics)


def held_out_coverage(predictor: Predictor, weights: Weights, held_out: Examples) -> Float[np.ndarray, " n"]:
    """Mean over budgets of each question: before any answer token, with the first ones, given earlier layers."""
    config, sizes = predictor.config, predictor.sizes
    layers, rows = config.num_layers, len(held_out)
    earlier = np.broadcast_to(np.tril(np.ones((layers, layers), bool), -1), (rows, layers, layers))
    knows = (None, None, Known(jnp.asarray(held_out.routing), jnp.asarray(earlier)))
    shares = []
    for inputs, known in zip(held_out.inputs, knows, strict=True):
        if known is not None and not held_out.follows_layers:
            continue
        predicted = np.asarray(network.distribution(weights, config, sizes, inputs, known))
        shares.append(np.mean([coverage_at(predicted, held_out.counts, residency) for residency in BUDGETS]))
    return np.array(shares)


def run(
    predictor: Predictor,
    train: Examples,
    held_out: Examples,
    plan: Hyperparameters,
    checkpoints: Checkpoints | None,
    report: Callable[[StepReport], None],
    stop_after: int | None = None,
) -> TrainState:
    """Train up to `plan.steps`, from the newest checkpoint if there is one.

    `stop_after` ends the run early without changing the schedule, as a kill would. Raises `DivergedError` before
    anything that is not a number is saved.
    """
    config, sizes = predictor.config, predictor.sizes
    state = start(config, sizes, plan)
    state = checkpoints.restore(state) if checkpoints else state
    floor = held_out_coverage(predictor, network.init(config, sizes, plan.seed), held_out)
    if int(state.step) == 0:
        state = state._replace(best_coverage=jnp.float32(floor.mean()))
    first, last = int(state.step), min(plan.steps, stop_after or plan.steps)
    for step in range(first, last):
        rng = np.random.default_rng((plan.seed, step))
        batch = train.batch(rng, plan.rows, plan.smoothing, plan.weight_power)
        state, metrics = train_step(state, batch, config, sizes, plan)
        if not np.isfinite(float(metrics.loss)):
            raise DivergedError(
                f"the loss is {float(metrics.loss)} at step {step + 1}; earlier checkpoints are as they were. "
                f"Try a lower --rate than {plan.peak_rate:g}"
            )
        measured = None
        if (step + 1) % plan.evaluate_every == 0 or step + 1 == last:
            by_question = held_out_coverage(predictor, state.averaged, held_out)
            measured = float(by_question.mean())
            # What is kept answers no question worse than the closed forms do.
            if measured > float(state.best_coverage) and (by_question >= floor).all():
                best = jax.tree.map(jnp.copy, state.averaged)
                state = state._replace(best=best, best_coverage=jnp.float32(measured), best_step=jnp.int32(step + 1))
        report(
            StepReport(
                step=step + 1,
                loss=float(metrics.loss),
                cross_entropy=float(metrics.cross_entropy),
                train_coverage=float(metrics.coverage),
                coverage=measured,
                best_coverage=float(state.best_coverage),
                best_step=int(state.best_step),
            )
        )
        if checkpoints and ((step + 1) % plan.checkpoint_every == 0 or step + 1 == last):
            checkpoints.save(state)
    return state


def prior_coverage(held_out: Examples) -> float:
    """What `held_out_coverage` is on average for the closed forms alone, where training starts."""
    asked = held_out.priors if held_out.follows_layers else held_out.priors[:2]
    return float(np.mean([coverage_at(p, held_out.counts, r) for p in asked for r in BUDGETS]))
