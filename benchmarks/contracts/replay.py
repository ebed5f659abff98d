"""Replay of a trace under the `bounded` contract: all tolerances in one pass, one token per step.

Residents are those that were loaded. Where a wish may not be substituted and is absent, its expert is loaded in place
of the resident one with the lowest score. Scores are means of the weights of wishes, which decay with every token. An
absent expert whose score is higher than that of a resident one by `exchange` is loaded in its place, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emoe_jax.traces import RoutingTrace

DECAY = 0.95
"""Of a score, per token."""


def replay(
    trace: RoutingTrace,
    trained: RoutingTrace,
    share: float,
    tolerances: Sequence[float],
    sacred: int = 1,
    exchange: float = np.inf,
    decay: float = DECAY,
) -> list[dict[str, float]]:
    """A row for each tolerance. `trained` says what is resident at first, which costs nothing.

    `breaches` are wishes that had to be loaded, per token and layer; `loads_per_token_layer` are these and those of
    exchanges. `free_tokens` needed no load in any layer before they could go on. `substituted_weight` is the share of
    the router's weight that other experts got.
    """
    L, E = trace.num_layers, trace.num_experts
    counts = np.stack([np.bincount(trained.experts[:, layer].ravel(), minlength=E) for layer in range(L)])
    start = counts / len(trained.experts) / trace.top_k
    probs = trace.probs.astype(np.float32)
    shares = probs / probs.sum(axis=-1, keepdims=True)
    slots = max(trace.top_k, round(share * E))
    bounds = np.asarray(tolerances, np.float32)
    chosen, start = trace.experts.astype(np.int32), start.astype(np.float32)
    sums = _replay(chosen, shares, start, bounds, np.float32(exchange), np.float32(decay), slots, sacred)
    tokens, rows = len(shares), []
    breaches, exchanges, free, weight, hits = (np.asarray(of, np.float64) for of in sums)
    for index, tolerance in enumerate(tolerances):
        rows.append(
            {
                "tolerance": float(tolerance),
                "breaches": breaches[index] / tokens / L,
                "loads_per_token_layer": (breaches[index] + exchanges[index]) / tokens / L,
                "substituted_weight": weight[index] / tokens / L,
                "free_tokens": free[index] / tokens,
                "coverage": hits[index] / tokens / L / trace.top_k,
            }
        )
    return rows


@partial(jax.jit, static_argnames=("slots", "sacred"))
def _replay(
    experts: Int[Array, "T L k"],
    shares: Float[Array, "T L k"],
    start: Float[Array, "L E"],
    tolerances: Float[Array, " N"],
    exchange: Float[Array | np.ndarray, ""],
    decay: Float[Array | np.ndarray, ""],
    slots: int,
    sacred: int,
) -> Any:
    """By tolerance: breaches, exchanges, free tokens, substituted weight, and wishes that were resident."""
    E = start.shape[1]

    def step(state: Any, token: Any) -> Any:
        resident, score = state
        chosen, weights = token
        by_expert = jax.nn.one_hot(chosen, E, dtype=jnp.float32)  # [L, k, E]
        weight = jnp.einsum("lk,lke->le", weights, by_expert)
        first = jnp.sum(by_expert[:, :sacred], axis=1) > 0
        wished = weight > 0
        may_go = (wished & ~first)[None] & (weight[None] < tolerances[:, None, None])
        absent = wished[None] & ~resident
        loaded, replaced = absent & ~may_go, absent & may_go
        score = decay * score + (1 - decay) * weight
        # What is loaded stays, what was used goes last, and of the others those of the lowest scores go.
        there = resident | loaded
        rank = jnp.where(there, score[None], -1.0) + jnp.where(there & wished[None], 1e6, 0.0)
        kept = jnp.argsort(jnp.argsort(-rank, axis=-1), axis=-1) < slots
        best, worst = jnp.where(kept, -jnp.inf, score[None]), jnp.where(kept, score[None], jnp.inf)
        pays = jnp.max(best, axis=-1) - jnp.min(worst, axis=-1) > exchange
        comes, goes = (jax.nn.one_hot(of, E, dtype=bool) for of in (jnp.argmax(best, -1), jnp.argmin(worst, -1)))
        kept = jnp.where(pays[..., None], (kept & ~goes) | comes, kept)
        sums = (
            jnp.sum(loaded, axis=(1, 2)),
            jnp.sum(pays, axis=1),
            ~jnp.any(loaded, axis=(1, 2)),
            jnp.sum(jnp.where(replaced, weight[None], 0.0), axis=(1, 2)),
            jnp.sum(wished[None] & resident, axis=(1, 2)),
        )
        return (kept, score), sums

    resident = jnp.argsort(jnp.argsort(-start, axis=-1), axis=-1) < slots
    resident = jnp.broadcast_to(resident[None], (len(tolerances), *resident.shape))
    _, sums = jax.lax.scan(step, (resident, start), (experts, shares))
    return jax.tree.map(lambda of: jnp.sum(of, axis=0), sums)
