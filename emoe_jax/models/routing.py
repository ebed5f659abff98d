"""The router: which experts are chosen, with what weight, when only some experts are resident."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.config import ModelConfig


class Routing(NamedTuple):
    """Choices of one MoE layer for `R` rows. An id of `E` (one past the last expert) means no assignment."""

    logits: Float[Array, "R E"]
    ids: Int[Array, "R k"]
    weights: Float[Array, "R k"]
    wish_ids: Int[Array, "R k"]
    wish_probs: Float[Array, "R k"]

    @property
    def known(self) -> Bool[Array, " R"]:
        """Whether a row's logits said anything: its wishes are NaN where they did not."""
        return ~jnp.isnan(self.wish_probs[:, 0])


def route(
    logits: Float[Array, "R E"],
    config: ModelConfig,
    allowed: Bool[Array, "R E"] | None = None,
    valid: Bool[Array, " R"] | None = None,
) -> Routing:
    """The `k` experts with the highest logits of those `allowed`, weighted as the family does.

    An expert that is not allowed is replaced by the next best that is (eMoE section 1.4). Where fewer than `k` are
    allowed, the ids left over are `E` with weight 0. `wish_*` are the unfiltered choices, best first, with their
    probabilities under the softmax over all experts. Rows where `valid` is false get no assignment.

    A family that renormalises weights the chosen experts by the softmax over their own logits: the quotient of their
    probabilities, but without underflow where a router is sure of absent experts. A family that does not renormalise
    weights them by their probabilities among all experts, so a substitute has its own, smaller weight; it is 0 where
    the probability underflows.

    An infinite logit counts as the largest float32. So weights are finite unless a row's logits hold NaN; such a row
    gets no assignment, and weights of NaN from which `moe_ffn` makes a row of NaN.

    Worked example, k = 2, probabilities [.5, .3, .2], expert 1 not allowed: wishes [0, 1], ids [0, 2],
    weights [.5, .2] raw or [.714, .286] renormalised.
    """
    limit = float(jnp.finfo(jnp.float32).max)
    bounded = jnp.clip(logits.astype(jnp.float32), -limit, limit)
    probs = jax.nn.softmax(bounded, axis=-1)
    chosen, wish_ids = jax.lax.top_k(bounded, config.top_k)
    wish_probs = jnp.take_along_axis(probs, wish_ids, axis=-1)
    weights, ids = wish_probs, wish_ids
    present = None  # all of them
    if allowed is not None:
        chosen, ids = jax.lax.top_k(jnp.where(allowed, bounded, -jnp.inf), config.top_k)
        weights = jnp.take_along_axis(probs, ids, axis=-1)
        present = chosen > -jnp.inf
    if config.norm_topk_prob:
        powers = jnp.exp(chosen - jnp.max(chosen, axis=-1, keepdims=True))
        weights = powers / jnp.sum(powers, axis=-1, keepdims=True)
    if present is not None:
        weights, ids = jnp.where(present, weights, 0.0), jnp.where(present, ids, config.num_experts)
    lost = jnp.any(jnp.isnan(bounded), axis=-1, keepdims=True)
    weights, ids = jnp.where(lost, jnp.nan, weights), jnp.where(lost, config.num_experts, ids)
    if valid is not None:
        ids = jnp.where(valid[:, None], ids, config.num_experts)
    if config.router_capacity_factor is not None:
        ids = _drop_over_capacity(ids, config, valid)
    return Routing(logits, ids, weights, wish_ids, wish_probs)


def _drop_over_capacity(ids: Int[Array, "R k"], config: ModelConfig, valid: Bool[Array, " R"] | None) -> Array:
    """OpenMoE's token dropping: all first choices in row order take slots of their expert, then all second ones.

    Capacity is `floor(k * factor * rows / E)`, made even, at least the minimum; an assignment past it becomes `E`.
    Rows that are not valid neither count nor take slots.
    """
    rows, k = ids.shape
    present = jnp.float32(rows) if valid is None else jnp.sum(valid).astype(jnp.float32)
    capacity = jnp.floor(k * config.router_capacity_factor * present / config.num_experts).astype(jnp.int32)  # pyright: ignore
    capacity = jnp.maximum(capacity + capacity % 2, config.router_min_capacity)
    in_order = ids.T.reshape(-1)  # first choices of every row, then second choices
    chosen = jax.nn.one_hot(in_order, config.num_experts, dtype=jnp.int32)
    place = jnp.sum((jnp.cumsum(chosen, axis=0) - chosen) * chosen, axis=-1)
    kept = (place < capacity).reshape(k, rows).T
    return jnp.where(kept, ids, config.num_experts)


class Substituted(NamedTuple):
    """What other experts stood in for, by row or by sequence."""

    choices: Int[Array, " R"]
    """How many of the wishes."""
    weight: Float[Array, " R"]
    """The share of the wishes' probability, 0 to 1 for a row of one layer."""


def substituted(routing: Routing, num_experts: int) -> Substituted:
    """What of each row's `k` wishes was not served because another expert stood in."""
    served = jnp.any(routing.wish_ids[:, :, None] == routing.ids[:, None, :], axis=-1)
    missed = ~served & (routing.ids[:, :1] < num_experts)  # rows without assignments wished for nothing
    wished = jnp.where(routing.known[:, None], routing.wish_probs, 1.0)  # NaN would reach the sums over rows
    weight = jnp.sum(wished * missed.astype(wished.dtype), axis=-1) / jnp.sum(wished, axis=-1)
    return Substituted(jnp.sum(missed, axis=-1, dtype=jnp.int32), weight)
