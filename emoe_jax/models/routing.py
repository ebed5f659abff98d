"""The router: which experts are chosen, with what weight, when only some experts are resident."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.config import ModelConfig, RouterConfig


class Allowances(NamedTuple):
    """Which of each row's wishes may be given up: `requests.contract.Allowance`, by row."""

    tolerance: Float[Array, " R"]
    budget: Float[Array, " R"]
    """What is left of it for this layer and those behind it."""
    sacred: Int[Array, " R"]

    def after(self, routing: "Routing") -> "Allowances":
        """What is left for the layers that follow."""
        return self._replace(budget=self.budget - routing.substituted_weight)


class Routing(NamedTuple):
    """Choices of one MoE layer for `R` rows. An id of `E` (one past the last expert) means no assignment."""

    logits: Float[Array, "R E"]
    ids: Int[Array, "R k"]
    weights: Float[Array, "R k"]
    wish_ids: Int[Array, "R k"]
    wish_probs: Float[Array, "R k"]
    """The scores of the wishes, without a bias or a scale: probabilities, or sigmoids."""
    substituted: Bool[Array, "R k"]
    """Which wishes are given up: another expert stands in, or none. None of rows without assignments."""
    ranked_ids: Int[Array, "R ranks"]
    """The wishes, and those that rank next, as many as the configuration has `ranks`."""
    ranked_probs: Float[Array, "R ranks"]
    """Their scores, like those of the wishes."""

    @property
    def known(self) -> Bool[Array, " R"]:
        """Whether a row's logits said anything: its wishes are NaN where they did not."""
        return ~jnp.isnan(self.wish_probs[:, 0])

    @property
    def wish_shares(self) -> Float[Array, "R k"]:
        """The weight of each wish over that of all the wishes of its row. NaN in rows of NaN."""
        return _shares(self.wish_probs)

    @property
    def substituted_weight(self) -> Float[Array, " R"]:
        """The shares of the substituted wishes, added up: 0 to 1."""
        return jnp.sum(jnp.where(self.substituted, self.wish_shares, 0.0), axis=-1)


def route(
    logits: Float[Array, "R E"],
    config: ModelConfig,
    allowed: Bool[Array, "R E"] | None = None,
    valid: Bool[Array, " R"] | None = None,
    allowances: Allowances | None = None,
    choice_bias: Float[Array, " E"] | None = None,
) -> Routing:
    """The `k` experts that rank highest of those `allowed`, weighted as the family does (`RouterConfig`).

    An expert that is not allowed is replaced by the next best that is (eMoE section 1.4). Where fewer than `k` are
    allowed, the ids left over are `E` with weight 0. `wish_*` are the unfiltered choices, best first, with their
    scores: the softmax over all experts, or the sigmoid of each logit. `ranked_*` go on behind the wishes, for traces.
    Rows where `valid` is false get no assignment.

    Experts rank by score, or by score plus `choice_bias`. Where experts have groups, those of the best groups rank
    before all others, so wishes are of these groups. An expert of another group stands in only where no other is left.
    A group is as good as the two best of its experts together (DeepSeek-V3), or as its best one (DeepSeek-V2).
    Weights and shares know no bias.

    With `allowances`, that holds for rows without a bound on their tolerance. The others keep their wishes and the
    weights of these, and do without some that are not allowed: those of the smallest shares, as far as tolerance,
    budget and sacred choices let them go.

    A family that renormalises weights the chosen experts by the quotient of their scores, computed from the logarithms
    of these: without underflow where a router is sure of absent experts. A family that does not renormalise weights
    them by their scores among all experts, so a substitute has its own weight; it is 0 where a softmax underflows.
    All weights are multiplied by the router's scale.

    An infinite logit counts as the largest float32. So weights are finite unless a row's logits hold NaN; such a row
    gets no assignment, and weights of NaN from which `moe_ffn` makes a row of NaN.

    Worked example, k = 2, probabilities [.5, .3, .2], expert 1 not allowed: wishes [0, 1], ids [0, 2],
    weights [.5, .2] raw or [.714, .286] renormalised.
    """
    limit = float(jnp.finfo(jnp.float32).max)
    bounded = jnp.clip(logits.astype(jnp.float32), -limit, limit)
    router = config.router
    scores, logs = _scores(bounded, router)
    ranks = _ranks(scores, logs, router, choice_bias)

    def logs_of(ids: Int[Array, "R k"], ranked: Float[Array, "R k"]) -> Float[Array, "R k"]:
        if ranks is logs:
            return ranked
        return jnp.where(ranked > -jnp.inf, jnp.take_along_axis(logs, ids, axis=-1), -jnp.inf)

    highest, ranked_ids = jax.lax.top_k(ranks, config.ranks)
    ranked_probs = jnp.take_along_axis(scores, ranked_ids, axis=-1)
    highest, wish_ids, wish_probs = (of[:, : config.top_k] for of in (highest, ranked_ids, ranked_probs))
    chosen = logs_of(wish_ids, highest)
    lost = jnp.any(jnp.isnan(bounded), axis=-1, keepdims=True)
    weights, ids = wish_probs, wish_ids
    present, substituted = None, jnp.zeros(ids.shape, jnp.bool_)  # all of them, and none
    if allowed is not None:
        substituted = ~jnp.take_along_axis(allowed, wish_ids, axis=-1)
        best, stand_ins = jax.lax.top_k(jnp.where(allowed, ranks, -jnp.inf), config.top_k)
        present = best > -jnp.inf
        best = logs_of(stand_ins, best)
        if allowances is None:
            chosen, ids = best, stand_ins
        else:
            has_bound = jnp.isfinite(allowances.tolerance)[:, None]
            substituted = jnp.where(has_bound, _may_go(substituted, wish_probs, allowances, router), substituted)
            present = jnp.where(has_bound, ~substituted, present)
            chosen, ids = jnp.where(has_bound, chosen, best), jnp.where(has_bound, wish_ids, stand_ins)
        weights = jnp.take_along_axis(scores, ids, axis=-1)
        substituted = substituted & ~lost
    if router.norm_topk_prob:
        powers = jnp.exp(chosen - jnp.max(chosen, axis=-1, keepdims=True))
        weights = powers / jnp.sum(powers, axis=-1, keepdims=True)
    if router.scale != 1:
        weights = weights * router.scale
    if present is not None:
        weights, ids = jnp.where(present, weights, 0.0), jnp.where(present, ids, config.num_experts)
    weights, ids = jnp.where(lost, jnp.nan, weights), jnp.where(lost, config.num_experts, ids)
    if valid is not None:
        ids = jnp.where(valid[:, None], ids, config.num_experts)
        substituted = substituted & valid[:, None]
    if router.capacity_factor is not None:
        ids = _drop_over_capacity(ids, config, valid)
    return Routing(logits, ids, weights, wish_ids, wish_probs, substituted, ranked_ids, ranked_probs)


def _scores(bounded: Float[Array, "R E"], router: RouterConfig) -> tuple[Float[Array, "R E"], Float[Array, "R E"]]:
    """Scores, and their logarithms but for a number that a row has in common."""
    if router.score == "softmax":
        return jax.nn.softmax(bounded, axis=-1), bounded
    smallest = float(jnp.finfo(jnp.float32).tiny)  # not 0: wishes that have no score would have no shares
    return jnp.maximum(jax.nn.sigmoid(bounded), smallest), jax.nn.log_sigmoid(bounded)


def _ranks(
    scores: Float[Array, "R E"],
    logs: Float[Array, "R E"],
    router: RouterConfig,
    choice_bias: Float[Array, " E"] | None,
) -> Float[Array, "R E"]:
    """What experts are ordered by. `logs` themselves where that is the order of the softmax."""
    if choice_bias is None and router.groups == 1 and router.score == "softmax":
        return logs
    ranks = scores if choice_bias is None else scores + choice_bias.astype(jnp.float32)[None, :]
    if router.groups == 1:
        return ranks
    size = ranks.shape[1] // router.groups
    best, _ = jax.lax.top_k(ranks.reshape(-1, router.groups, size), 2 if router.group_rank == "two_best" else 1)
    _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), router.chosen_groups)
    groups = jnp.arange(router.groups, dtype=jnp.int32)
    inside = jnp.any(chosen[:, :, None] == groups[None, None, :], axis=1)
    spread = jnp.max(ranks, axis=-1, keepdims=True) - jnp.min(ranks, axis=-1, keepdims=True)
    return jnp.where(jnp.repeat(inside, size, axis=1), ranks, ranks - spread - 1)


def _shares(wish_probs: Float[Array, "R k"]) -> Float[Array, "R k"]:
    return wish_probs / jnp.sum(wish_probs, axis=-1, keepdims=True)


def _may_go(
    absent: Bool[Array, "R k"], wish_probs: Float[Array, "R k"], allowances: Allowances, router: RouterConfig
) -> Bool[Array, "R k"]:
    """Which of the absent wishes are given up: shares add up from the smallest one on."""
    shares = _shares(wish_probs)
    rank = jnp.arange(shares.shape[1], dtype=jnp.int32)[None, :]
    spared = (shares < allowances.tolerance[:, None]) & (rank >= allowances.sacred[:, None])
    candidates = absent & spared
    given = jnp.where(candidates, shares, 0.0)
    if router.choice_bias:  # then a wish may weigh more than one that ranks before it
        smaller = shares[:, None, :] < shares[:, :, None]
        as_small = (shares[:, None, :] == shares[:, :, None]) & (rank[:, None, :] >= rank[:, :, None])
        spent = jnp.sum(jnp.where(smaller | as_small, given[:, None, :], 0.0), axis=-1)
    else:
        spent = jnp.cumsum(given[:, ::-1], axis=-1)[:, ::-1]
    return candidates & (spent <= allowances.budget[:, None])


def _drop_over_capacity(ids: Int[Array, "R k"], config: ModelConfig, valid: Bool[Array, " R"] | None) -> Array:
    """OpenMoE's token dropping: all first choices in row order take slots of their expert, then all second ones.

    Capacity is `floor(k * factor * rows / E)`, made even, at least the minimum; an assignment past it becomes `E`.
    Rows that are not valid neither count nor take slots.
    """
    rows, k = ids.shape
    present = jnp.float32(rows) if valid is None else jnp.sum(valid).astype(jnp.float32)
    capacity = jnp.floor(k * config.router.capacity_factor * present / config.num_experts).astype(jnp.int32)  # pyright: ignore
    capacity = jnp.maximum(capacity + capacity % 2, config.router.min_capacity)
    in_order = ids.T.reshape(-1)  # first choices of every row, then second choices
    chosen = jax.nn.one_hot(in_order, config.num_experts, dtype=jnp.int32)
    place = jnp.sum((jnp.cumsum(chosen, axis=0) - chosen) * chosen, axis=-1)
    kept = (place < capacity).reshape(k, rows).T
    return jnp.where(kept, ids, config.num_experts)
