"""Replay of a trace under the `bounded` contract: all tolerances in one pass.

Residents are those that were loaded. Where a wish may not be substituted and is absent, its expert is loaded in place
of the resident one with the lowest score. Scores are means of the weights of wishes, which decay with every token. An
absent expert whose score is higher than that of a resident one by `exchange` is loaded in its place, too.

A step takes the next token of each of `batch` prompts. An expert that one of them needs is loaded for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emoe_jax.traces import RoutingTrace

DECAY = 0.95
"""Of a score, per token."""


class Replayed(NamedTuple):
    """A replay under so many tolerances `N`."""

    rows: list[dict[str, float]]
    loads: Int[np.ndarray, "N steps L"]
    """Experts that a step had to load before it could go on, by layer."""
    used: Int[np.ndarray, "N steps L"]
    """Different experts that a step computed with, by layer; those that it loaded are among them."""


def replay(
    trace: RoutingTrace,
    trained: RoutingTrace,
    share: float,
    tolerances: Sequence[float],
    sacred: int = 1,
    exchange: float = np.inf,
    decay: float = DECAY,
    batch: int = 1,
) -> Replayed:
    """`trained` says what is resident at first, which costs nothing. Rows, one for each tolerance, are of tokens:

    `breaches` are experts that had to be loaded, per token and layer; `loads_per_token_layer` are these and those of
    exchanges. `free_tokens` needed no load in any layer before they could go on, nor did others of their step.
    `substituted_weight` is the share of the router's weight that other experts got.
    """
    L, E = trace.num_layers, trace.num_experts
    counts = np.stack([np.bincount(trained.experts[:, layer].ravel(), minlength=E) for layer in range(L)])
    start = counts / len(trained.experts) / trace.top_k
    rows = side_by_side(trace, batch)
    probs = trace.probs[rows].astype(np.float32)
    shares = probs / probs.sum(axis=-1, keepdims=True)
    slots = max(trace.top_k, round(share * E))
    bounds = np.asarray(tolerances, np.float32)
    chosen, start = trace.experts[rows].astype(np.int32), start.astype(np.float32)
    (kept, of_steps) = _replay(
        chosen, shares, start, bounds, np.float32(exchange), np.float32(decay**batch), slots, sacred
    )
    exchanges, weight, hits = (np.asarray(of, np.float64) for of in kept)
    loads, used = (np.moveaxis(np.asarray(of), 0, 1) for of in of_steps)
    tokens, found = rows.size, []
    for index, tolerance in enumerate(tolerances):
        breaches = float(loads[index].sum())
        found.append(
            {
                "tolerance": float(tolerance),
                "breaches": breaches / tokens / L,
                "loads_per_token_layer": (breaches + exchanges[index]) / tokens / L,
                "substituted_weight": weight[index] / tokens / L,
                "free_tokens": float((loads[index].sum(axis=-1) == 0).mean()),
                "coverage": hits[index] / tokens / L / trace.top_k,
            }
        )
    return Replayed(found, loads, used)


def side_by_side(trace: RoutingTrace, batch: int) -> Int[np.ndarray, "steps batch"]:
    """The tokens of each step, as rows of the trace, until the first place runs out of prompts. Each prompt goes to the
    place that is free first.

    Worked example, prompts of 3, 2 and 2 tokens at batch 2: `[[0, 3], [1, 4], [2, 5]]`; the last token of the third
    prompt has no companion.
    """
    places: list[list[int]] = [[] for _ in range(batch)]
    order = np.argsort(trace.sample, kind="stable")  # prompts may interleave
    lengths = np.bincount(trace.sample, minlength=trace.num_prompts)
    for tokens in np.split(order, np.cumsum(lengths)[:-1]):
        min(places, key=len).extend(tokens.tolist())
    steps = min(map(len, places))
    return np.stack([np.asarray(place[:steps], np.int64) for place in places], axis=1)


@partial(jax.jit, static_argnames=("slots", "sacred"))
def _replay(
    experts: Int[Array, "T B L k"],
    shares: Float[Array, "T B L k"],
    start: Float[Array, "L E"],
    tolerances: Float[Array, " N"],
    exchange: Float[Array | np.ndarray, ""],
    decay: Float[Array | np.ndarray, ""],
    slots: int,
    sacred: int,
) -> Any:
    """By tolerance: exchanges, substituted weight, and wishes that were resident, of all steps; and of each step and
    layer the loads that it waited for, and the experts that it used.
    """
    E = start.shape[1]

    def step(state: Any, tokens: Any) -> Any:
        resident, score = state  # [N, L, E], [L, E]
        chosen, weights = tokens
        by_expert = jax.nn.one_hot(chosen, E, dtype=jnp.float32)  # [B, L, k, E]
        weight = jnp.einsum("blk,blke->ble", weights, by_expert)
        first = jnp.sum(by_expert[:, :, :sacred], axis=2) > 0
        wished = weight > 0
        may_go = (wished & ~first)[None] & (weight[None] < tolerances[:, None, None, None])
        absent = wished[None] & ~resident[:, None]
        loaded = jnp.any(absent & ~may_go, axis=1)
        replaced = absent & ~loaded[:, None]
        used = jnp.any(wished[None] & ~replaced, axis=1)
        score = decay * score + (1 - decay) * jnp.mean(weight, axis=0)
        # What is loaded stays, what was used goes last, and of the others those of the lowest scores go.
        there, any_wished = resident | loaded, jnp.any(wished, axis=0)
        rank = jnp.where(there, score[None], -1.0) + jnp.where(there & any_wished[None], 1e6, 0.0)
        kept = jnp.argsort(jnp.argsort(-rank, axis=-1), axis=-1) < slots
        best, worst = jnp.where(kept, -jnp.inf, score[None]), jnp.where(kept, score[None], jnp.inf)
        pays = jnp.max(best, axis=-1) - jnp.min(worst, axis=-1) > exchange
        comes, goes = (jax.nn.one_hot(of, E, dtype=bool) for of in (jnp.argmax(best, -1), jnp.argmin(worst, -1)))
        kept = jnp.where(pays[..., None], (kept & ~goes) | comes, kept)
        sums = (
            jnp.sum(pays, axis=1),
            jnp.sum(jnp.where(replaced, weight[None], 0.0), axis=(1, 2, 3)),
            jnp.sum(wished[None] & resident[:, None], axis=(1, 2, 3)),
        )
        return (kept, score), (sums, (jnp.sum(loaded, axis=-1), jnp.sum(used, axis=-1)))

    resident = jnp.argsort(jnp.argsort(-start, axis=-1), axis=-1) < slots
    resident = jnp.broadcast_to(resident[None], (len(tolerances), *resident.shape))
    _, (sums, of_steps) = jax.lax.scan(step, (resident, start), (experts, shares))
    return jax.tree.map(lambda of: jnp.sum(of, axis=0), sums), of_steps
