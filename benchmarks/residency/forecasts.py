"""What each policy plans with, for every replayed prompt, learned from the prompts before."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from emoe_jax.policies import POLICIES, PolicyWeights
from emoe_jax.policies.caching import random_rates
from emoe_jax.policies.dynamics import Dynamics
from emoe_jax.policies.learning import learn_transitions
from emoe_jax.policies.rivals import activation_matrices
from emoe_jax.predictor import Predictor, PredictorConfig, Prompts
from emoe_jax.predictor.inputs import History
from emoe_jax.predictor.predictor import MAX_MEMORY
from emoe_jax.predictor.prompts import frequencies
from emoe_jax.traces import RoutingTrace, TraceError
from train.predictor.answers import learn_answers
from train.predictor.examples import closed_forms

Report = Callable[[str], None]


class Learned(NamedTuple):
    """All that is taken from the training trace."""

    knowledge: PolicyWeights
    prompts: Prompts
    predictor: Predictor
    left_out: Float[np.ndarray, "P M E"]
    """What the closed forms say of the latest prompts, each learned from all others: plans to learn dynamics with."""


def learn_from(
    trace: RoutingTrace,
    predictor: Predictor | None = None,
    dynamics: Dynamics | None = None,
    report: Report = lambda line: None,
) -> Learned:
    """`predictor` None: the closed forms, fitted to the trace. `dynamics` None: learned from the trace.

    Dynamics learn from the closed forms' word on left-out prompts, because what a trained predictor says of
    prompts that it may have seen is better than what it will say of others.
    """
    trace = trace.select(np.flatnonzero(np.bincount(trace.sample, minlength=trace.num_prompts)))
    dim = 0 if trace.prompt_embedding is None else trace.prompt_embedding.shape[1]
    config = PredictorConfig(trace.num_layers, trace.num_experts, trace.top_k, dim)
    prompts = Prompts.of(trace, config.first_tokens)
    learned, opinions = closed_forms(prompts, np.arange(len(prompts)), config, trace)
    left_out = opinions.plain[-MAX_MEMORY:]
    if dynamics is None:
        latest = trace.select(range(trace.num_prompts - len(left_out), trace.num_prompts))
        dynamics = learn_answers(latest, left_out, report=report)
    knowledge = PolicyWeights(dynamics, learn_transitions(trace), activation_matrices(trace.counts()))
    return Learned(knowledge, prompts, predictor or learned, left_out)


def predicted(
    predictor: Predictor, trace: RoutingTrace, predict_every: int, with_history: bool = True
) -> Float[np.ndarray, "P M E"]:
    """Expected shares by prompt; `predict_every` prompts in a row use the forecast of the first of them."""
    predictor.config.check_model(trace.num_layers, trace.num_experts, trace.top_k, trace.source)
    prompts = Prompts.of(trace, predictor.config.first_tokens, predictor.config.embedding_dim)
    histories = History.of(prompts.counts) if with_history else [predictor.history] * len(prompts)
    used = np.arange(len(prompts)) // predict_every * predict_every
    return predictor.predict_many(prompts, histories, with_first=False)[used]


def plan_of(
    policy: str, learned: Learned, trace: RoutingTrace, predict_every: int, predictor: Predictor | None = None
) -> Float[np.ndarray, "P M E"]:
    """The shares that a policy of this name plans with, by prompt of `trace`."""
    counts, tasks = learned.prompts.counts, trace.tasks
    shape = (len(tasks), *counts.shape[1:])
    if policy == "random":
        rates = random_rates(*counts.shape[1:])
        return np.broadcast_to(rates / rates.sum(-1, keepdims=True), shape)
    kind = POLICIES["static-global" if policy == "oracle" else policy]
    if kind.forecast == "prompt":
        return predicted(predictor or learned.predictor, trace, kind.predict_every or predict_every)
    if kind.forecast == "none":
        return np.broadcast_to(np.float32(1 / shape[2]), shape)
    overall = frequencies(counts.sum(0))
    of_task = {
        task: frequencies(counts[[i for i, other in enumerate(learned.prompts.tasks) if other == task]].sum(0))
        for task in (set(tasks) & set(learned.prompts.tasks) if kind.forecast == "task" else ())
    }
    return np.stack([of_task.get(task, overall) for task in tasks])


def check_traces(trained: RoutingTrace, replayed: RoutingTrace) -> None:
    """Raise `TraceError` where two traces are of different models."""
    shapes = [(of.num_layers, of.num_experts, of.top_k) for of in (trained, replayed)]
    dims = [0 if of.prompt_embedding is None else of.prompt_embedding.shape[1] for of in (trained, replayed)]
    if shapes[0] != shapes[1]:
        raise TraceError(f"{replayed.source} is of {replayed.describe()}; {trained.source} is of {trained.describe()}")
    if dims[1] not in (0, dims[0]):
        raise TraceError(
            f"{replayed.source} has embeddings of {dims[1]} values; those of {trained.source} have {dims[0]}"
        )
