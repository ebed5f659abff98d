"""What each policy plans with, for every replayed prompt, learned from the prompts before."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from benchmarks.residency.stream import FIRST_TOKENS, Forecasts
from emoe_jax.policies import POLICIES, Knowledge
from emoe_jax.policies.caching import random_rates
from emoe_jax.policies.learning import learn
from emoe_jax.predictor import Predictor, PredictorConfig, Prompts
from emoe_jax.predictor.prompts import frequencies
from emoe_jax.traces import RoutingTrace, TraceError


class Learned(NamedTuple):
    """All that is taken from the training trace."""

    knowledge: Knowledge
    prompts: Prompts
    predictor: Predictor


def learn_from(trace: RoutingTrace, predictor: Predictor | None) -> Learned:
    """`predictor` None: the closed-form prior, fitted to the trace.

    Dynamics always learn from the closed-form prior's word on left-out prompts, because what a trained predictor says
    of prompts that it may have seen is better than what it will say of others.
    """
    trace = trace.select(np.flatnonzero(np.bincount(trace.sample, minlength=trace.num_prompts)))
    dim = 0 if trace.prompt_embedding is None else trace.prompt_embedding.shape[1]
    prompts = Prompts.of(trace, FIRST_TOKENS)
    config = PredictorConfig(trace.num_layers, trace.num_experts, trace.top_k, dim)
    prior = Predictor(config, prompts)
    start, later = (of.left_out() for of in prior.priors)
    latest = trace.select(range(trace.num_prompts - len(start), trace.num_prompts))  # all that a predictor remembers
    return Learned(learn(latest, start, later), prompts, predictor or prior)


def predicted(predictor: Predictor, trace: RoutingTrace, predict_every: int) -> Forecasts:
    """By prompt, task and embedding; `predict_every` prompts in a row use the forecast of the first of them."""
    predictor.config.check_model(trace.num_layers, trace.num_experts, trace.top_k, trace.source)
    prompts = Prompts.of(trace, FIRST_TOKENS, predictor.config.embedding_dim)
    histories = [predictor.history] * len(prompts)
    start, later = (predictor.predict_many(prompts, histories, with_first) for with_first in (False, True))
    used = np.arange(len(prompts)) // predict_every * predict_every
    return Forecasts(start[used], later[used])


def forecasts_of(policy: str, learned: Learned, by_prompt: Forecasts, tasks: list[str]) -> Forecasts:
    """What a policy of this name plans with."""
    counts = learned.prompts.counts
    shape = (len(tasks), *counts.shape[1:])
    kind = "global" if policy == "oracle" else POLICIES[policy].forecast
    if policy == "random":
        rates = random_rates(*counts.shape[1:])
        shares = np.broadcast_to(rates / rates.sum(-1, keepdims=True), shape)
    elif kind == "prompt":
        return by_prompt
    elif kind == "none":
        shares = np.broadcast_to(np.float32(1 / shape[2]), shape)
    else:
        overall = frequencies(counts.sum(0))
        of_task = {
            task: frequencies(counts[[i for i, other in enumerate(learned.prompts.tasks) if other == task]].sum(0))
            for task in (set(tasks) & set(learned.prompts.tasks) if kind == "task" else ())
        }
        shares = np.stack([of_task.get(task, overall) for task in tasks])
    return Forecasts(shares, shares)


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
