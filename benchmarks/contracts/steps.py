"""Replay of a trace whose prompts run side by side: what each step of a batch loads under `bounded`, and what it uses.

Residents are as in `replay`, those that were loaded; mean weights say who goes. A step takes the next token of each
prompt. An expert that one of them needs is loaded once, for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.contracts.replay import DECAY
from emoe_jax.traces import RoutingTrace


class Steps(NamedTuple):
    """Of a replay under so many tolerances `N`."""

    tolerances: tuple[float, ...]
    loads: Int[np.ndarray, "N steps L"]
    """Experts that a step had to load before it could go on, by layer."""
    used: Int[np.ndarray, "N steps L"]
    """Different experts that a step computed with, by layer; those that it loaded are among them."""
    given_up: Float[np.ndarray, " N"]
    """Share of the router's weight that was left out."""


def replay_steps(
    trace: RoutingTrace,
    trained: RoutingTrace,
    share: float,
    tolerances: Sequence[float],
    batch: int,
    sacred: int = 1,
    decay: float = DECAY,
) -> Steps:
    """All tolerances in one pass. `trained` says what is resident at first, which costs nothing."""
    L, E = trace.num_layers, trace.num_experts
    counts = np.stack([np.bincount(trained.experts[:, layer].ravel(), minlength=E) for layer in range(L)])
    start = (counts / len(trained.experts) / trace.top_k).astype(np.float32)
    rows = side_by_side(trace, batch)
    probs = trace.probs[rows].astype(np.float32)
    shares, chosen = probs / probs.sum(axis=-1, keepdims=True), trace.experts[rows].astype(np.int32)
    slots, bounds = max(trace.top_k, round(share * E)), np.asarray(tolerances, np.float32)
    loads, used, weight = _replay(chosen, shares, start, bounds, np.float32(decay**batch), slots, sacred)
    loads, used = (np.moveaxis(np.asarray(of), 0, 1) for of in (loads, used))
    return Steps(tuple(tolerances), loads, used, np.asarray(weight, np.float64).sum(axis=0) / rows.size / L)


def side_by_side(trace: RoutingTrace, batch: int) -> Int[np.ndarray, "steps B"]:
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
    decay: Float[Array | np.ndarray, ""],
    slots: int,
    sacred: int,
) -> tuple[Int[Array, "T N L"], Int[Array, "T N L"], Float[Array, "T N"]]:
    """Loads and used experts of each step, and the weight that it left out."""
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
        left_out = absent & ~loaded[:, None]
        used = jnp.any(wished[None] & ~left_out, axis=1)
        score = decay * score + (1 - decay) * jnp.mean(weight, axis=0)
        # What is loaded stays, what was used goes last, and of the others those of the lowest scores go.
        there, any_wished = resident | loaded, jnp.any(wished, axis=0)
        rank = jnp.where(there, score[None], -1.0) + jnp.where(there & any_wished[None], 1e6, 0.0)
        kept = jnp.argsort(jnp.argsort(-rank, axis=-1), axis=-1) < slots
        given_up = jnp.sum(jnp.where(left_out, weight[None], 0.0), axis=(1, 2, 3))
        return (kept, score), (jnp.sum(loaded, axis=-1), jnp.sum(used, axis=-1), given_up)

    resident = jnp.argsort(jnp.argsort(-start, axis=-1), axis=-1) < slots
    resident = jnp.broadcast_to(resident[None], (len(tolerances), *resident.shape))
    return jax.lax.scan(step, (resident, start), (experts, shares))[1]
