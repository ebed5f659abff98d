"""Replay of a trace under the `bounded` contract: all tolerances in one pass, one token per step.

Residents are those that were loaded. Where a wish may not be substituted and is absent, its expert is loaded in place
of the resident one with the lowest score. Scores are means of the weights of wishes, which decay with every token, or
those of a policy. An absent expert whose score is higher than that of a resident one by `exchange` is loaded in its
place, too.

Where the trace holds more ranks than the router chose, the replay also finds out which resident experts would have
stood in for those that were replaced, each the next best one, and with what weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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
    scores: Float[np.ndarray, "tokens M E"] | None = None,
) -> list[dict[str, float]]:
    """A row for each tolerance. `trained` says what is resident at first, which costs nothing. `scores` are those after
    each token, of a policy; without them means of weights decide.

    `breaches` are wishes that had to be loaded, per token and layer; `loads_per_token_layer` are these and those of
    exchanges. `free_tokens` needed no load in any layer before they could go on. `substituted_weight` is the share of
    the router's weight that replaced experts had.

    From a trace with further ranks: `stand_in_weight` is what the next best resident experts have in their place, in
    the same unit, `margin` by how much a replaced expert is ahead of its stand-in, on average, and
    `known_stand_ins` the share of the replaced ones whose stand-in the trace knows.
    """
    L, E = trace.num_layers, trace.num_experts
    counts = np.stack([np.bincount(trained.experts[:, layer].ravel(), minlength=E) for layer in range(L)])
    start = counts / len(trained.experts) / trace.top_k
    probs = trace.probs.astype(np.float32)
    whole = probs.sum(axis=-1, keepdims=True)
    shares = probs / whole
    further = None
    if trace.further_experts is not None and trace.further_probs is not None:
        further = trace.further_experts.astype(np.int32), trace.further_probs.astype(np.float32) / whole
    slots = max(trace.top_k, round(share * E))
    bounds = np.asarray(tolerances, np.float32)
    chosen, start = trace.experts.astype(np.int32), start.astype(np.float32)
    tokens_of = (chosen, shares, further, scores)
    sums = _replay(tokens_of, start, bounds, np.float32(exchange), np.float32(decay), slots, sacred)
    tokens, rows = len(shares), []
    breaches, exchanges, free, weight, hits, *stood_in = (np.asarray(of, np.float64) for of in sums)
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
        if stood_in:
            replaced, known, margin, stand_ins = (of[index] for of in stood_in)
            rows[-1] |= {
                "stand_in_weight": stand_ins / tokens / L,
                "margin": margin / known if known else 0.0,
                "known_stand_ins": known / replaced if replaced else 1.0,
            }
    return rows


@partial(jax.jit, static_argnames=("slots", "sacred"))
def _replay(
    tokens: Any,
    start: Float[Array, "L E"],
    tolerances: Float[Array, " N"],
    exchange: Float[Array | np.ndarray, ""],
    decay: Float[Array | np.ndarray, ""],
    slots: int,
    sacred: int,
) -> Any:
    """By tolerance: breaches, exchanges, free tokens, substituted weight, and wishes that were resident.

    Of `tokens` the experts, their shares, the same of further ranks or None, and the scores or None. With further ranks
    also what `_stand_ins` returns.
    """
    E = start.shape[1]

    def step(state: Any, token: Any) -> Any:
        resident, score = state
        chosen, weights, behind, given = token
        by_expert = jax.nn.one_hot(chosen, E, dtype=jnp.float32)  # [L, k, E]
        weight = jnp.einsum("lk,lke->le", weights, by_expert)
        first = jnp.sum(by_expert[:, :sacred], axis=1) > 0
        wished = weight > 0
        may_go = (wished & ~first)[None] & (weight[None] < tolerances[:, None, None])
        absent = wished[None] & ~resident
        loaded, replaced = absent & ~may_go, absent & may_go
        score = decay * score + (1 - decay) * weight if given is None else given
        # What is loaded stays, what was used goes last, and of the others those of the lowest scores go.
        there = resident | loaded
        rank = jnp.where(there, score[None], -jnp.inf) + jnp.where(there & wished[None], 1e6, 0.0)
        kept = jnp.argsort(jnp.argsort(-rank, axis=-1), axis=-1) < slots
        stood_in = () if behind is None else _stand_ins(replaced, weight, resident & kept, *behind)
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
            *stood_in,
        )
        return (kept, score), sums

    resident = jnp.argsort(jnp.argsort(-start, axis=-1), axis=-1) < slots
    resident = jnp.broadcast_to(resident[None], (len(tolerances), *resident.shape))
    _, sums = jax.lax.scan(step, (resident, start), tokens)
    return jax.tree.map(lambda of: jnp.sum(of, axis=0), sums)


def _stand_ins(
    replaced: Bool[Array, "n L E"],
    weight: Float[Array, "L E"],
    resident: Bool[Array, "n L E"],
    behind: Int[Array, "L further"],
    shares: Float[Array, "L further"],
) -> tuple[Array, Array, Array, Array]:
    """How many experts are replaced, for how many of them the trace knows a stand-in, by how much these are ahead of
    theirs in all, and the weight of the stand-ins.

    The best of the replaced gets the best resident expert behind the chosen ones, the next one the next.
    """
    k_most = min(replaced.shape[-1], behind.shape[-1])
    lacking = jax.lax.top_k(jnp.where(replaced, weight[None], -1.0), k_most)[0]
    there = jnp.take_along_axis(resident, jnp.broadcast_to(behind[None], (len(resident), *behind.shape)), axis=-1)
    standing = jax.lax.top_k(jnp.where(there, shares[None], -1.0), k_most)[0]
    known = (lacking >= 0) & (standing >= 0)
    ahead, found = jnp.where(known, lacking - standing, 0.0), jnp.where(known, standing, 0.0)
    return tuple(jnp.sum(of, axis=(1, 2)) for of in (replaced, known, ahead, found))  # pyright: ignore
