"""What the policy `emoe` says of every expert after each token of a trace, one request at a time."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from benchmarks.residency.forecasts import Learned, plan_of
from benchmarks.residency.stream import Plans, make_plans, make_stream
from emoe_jax.policies import POLICIES
from emoe_jax.policies.rule import ExpectedWishes, Rule
from emoe_jax.traces import RoutingTrace

CHUNK = 256
"""Tokens whose scores are computed in one go."""
SPARED = 0.3
"""What a wish that would be no breach counts for, where one that would be counts for 1."""

Observed = Literal["wishes", "weights", "breaches"]
"""What the policy is told of a token: its wishes, each counting for 1, for its weight, or for more if it may not be
replaced."""


def worth(
    trace: RoutingTrace, observed: Observed, tolerance: float = 0.0, sacred: int = 1
) -> Float[np.ndarray, "tokens M k"]:
    """What each wish counts for; those of a token and layer add up to k. `tolerance` and `sacred` make breaches.

    Worked example, shares [0.4, 0.3, 0.2, 0.1] and a tolerance of 0.25: breaches count [1.54, 1.54, 0.46, 0.46].
    """
    probs = trace.probs.astype(np.float32)
    shares = probs / probs.sum(axis=-1, keepdims=True)
    if observed == "wishes":
        return np.ones_like(shares)
    if observed == "breaches":
        is_breach = (shares >= tolerance) | (np.arange(trace.top_k) < sacred)
        shares = np.where(is_breach, 1.0, SPARED).astype(np.float32)
    return trace.top_k * shares / shares.sum(axis=-1, keepdims=True)


def policy_scores(
    trace: RoutingTrace, learned: Learned, counted: Float[np.ndarray, "tokens M k"]
) -> Float[np.ndarray, "tokens M E"]:
    """Wishes per token expected over the next few, by a policy that is told of every prompt that begins, and of wishes
    what they count for (`worth`). The trace has its prompts one after the other."""
    stream = make_stream(trace, 1)
    plans = make_plans(stream, plan_of("emoe", learned, trace, 1), trace.top_k)
    rule = POLICIES["emoe"].rule(trace.num_layers, trace.num_experts, learned.knowledge)
    tokens, padding = len(stream.experts), -len(stream.experts) % CHUNK
    experts = np.pad(stream.experts[:, 0], ((0, padding), (0, 0), (0, 0)), constant_values=trace.num_experts)
    counted = np.pad(counted, ((0, padding), (0, 0), (0, 0)))
    is_new, plan = np.pad(stream.is_new, (0, padding)), np.pad(stream.plan, (0, padding), mode="edge")
    chunks = tuple(array.reshape(-1, CHUNK, *array.shape[1:]) for array in (experts, counted, is_new, plan))
    scores = np.asarray(_followed(chunks, plans, rule))
    return scores.reshape(-1, *scores.shape[2:])[:tokens]


@partial(jax.jit, static_argnames=("rule",))
def _followed(
    chunks: tuple[
        Int[Array, "n tokens M k"], Float[Array, "n tokens M k"], Bool[Array, "n tokens"], Int[Array, "n tokens"]
    ],
    plans: Plans,
    rule: Rule[Any],
) -> Float[Array, "n tokens M E"]:
    """Observed token by token; scores of a whole chunk are made together."""
    num_experts = plans.rates.shape[-1]

    def follow(state: Any, token: Any) -> tuple[Any, Any]:
        experts, counted, is_new, plan = token
        expected = ExpectedWishes(*(jnp.asarray(array)[plan] for array in plans))
        state = jax.lax.cond(is_new, rule.plan, lambda state, _: state, state, expected)
        wished = experts.astype(jnp.int32)[..., None] == jnp.arange(num_experts)[None, None]
        state = rule.observe(state, jnp.sum(jnp.where(wished, counted[..., None], 0.0), axis=1))
        return state, state

    def one_chunk(state: Any, chunk: Any) -> tuple[Any, Array]:
        state, states = jax.lax.scan(follow, state, chunk)
        return state, rule.scores(states)

    return jax.lax.scan(one_chunk, rule.start(jnp.asarray(plans.rates[0])), chunks)[1]
