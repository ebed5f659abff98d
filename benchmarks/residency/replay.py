"""Replay of a trace under a policy: compiled, all layers and all residencies at once.

In chunks of steps: what the policy observes is followed step by step, its scores are computed for the whole chunk in
matrix products (they do not depend on what is resident), then experts are exchanged step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from benchmarks.residency.stream import Plans, Stream
from emoe_jax.policies.belady import next_use
from emoe_jax.policies.rule import ExpectedWishes, Rule

CHUNK_TOKENS = 1024


class Totals(NamedTuple):
    """Sums over all steps and layers for each of some residencies. What is wished in a step meets what was resident
    before it; what is loaded for it serves the next.
    """

    hits: Any  # assignments whose expert was resident
    free_tokens: Any  # tokens that found every expert of every layer
    missed_weight: Any  # of the router's weights
    misses: Any  # distinct experts of a step and layer that were wished for and absent
    moved: Any  # experts loaded


def replay(
    stream: Stream,
    num_experts: int,
    capacities: Sequence[Sequence[int]] | Int[np.ndarray, "residencies M"],
    rule: Rule[Any] | None,
    plans: Plans,
    swaps_per_step: int,
    within_step: bool = False,
) -> Totals:
    """`rule` None is Belady's oracle: an absent expert that was wished for replaces the one not wished for longest.
    When a plan begins, it may load any expert, as every other policy may.

    `capacities` are slots per layer, one row for each residency. A new plan may exchange any number of experts; other
    steps at most `swaps_per_step` per layer. The first plan's experts are there at no cost. `within_step`: scores of a
    step come from the choices in it (see `NextLayerRouter`).
    """
    T, R = stream.prompt.shape
    chunk = max(1, CHUNK_TOKENS // R)
    padding = -T % chunk
    steps = {
        "experts": np.pad(stream.experts, ((0, padding), (0, 0), (0, 0), (0, 0)), constant_values=num_experts),
        "probs": np.pad(stream.probs, ((0, padding), (0, 0), (0, 0), (0, 0))),
        "is_new": np.pad(stream.is_new, (0, padding)),
        "plan": np.pad(stream.plan, (0, padding), mode="edge"),
    }
    if rule is None:
        steps["next_use"] = next_use(_wished(steps["experts"], num_experts))
    chunks = {name: array.reshape(-1, chunk, *array.shape[1:]) for name, array in steps.items()}
    slots = jnp.asarray(capacities)
    by_chunk = _replay(chunks, plans, slots, num_experts, rule, swaps_per_step, within_step)
    return Totals(*(np.asarray(sums, np.float64).sum(0) for sums in by_chunk))


@partial(jax.jit, static_argnames=("num_experts", "rule", "limit", "within_step"))
def _replay(
    chunks: dict[str, Array],
    plans: Plans,
    capacities: Int[Array, "residencies M"],
    num_experts: int,
    rule: Rule[Any] | None,
    limit: int,
    within_step: bool,
) -> Totals:
    first = jnp.argsort(jnp.argsort(-plans.rates[0], axis=-1), axis=-1)
    resident = first[None] < capacities[:, :, None]  # [residencies, M, E]

    def follow(state: Any, step: dict[str, Array]) -> tuple[Any, Any]:
        assert rule is not None
        expected = ExpectedWishes(*(array[step["plan"]] for array in plans))
        before = jax.lax.cond(step["is_new"], rule.plan, lambda state, _: state, state, expected)
        after = rule.observe(before, _counts(step["experts"], num_experts).astype(jnp.float32))
        return after, after if within_step else before

    def one_chunk(carry: Any, steps: dict[str, Array]) -> tuple[Any, Totals]:
        state, resident, last = carry
        if rule is None:
            scores = -steps["next_use"].astype(jnp.float32)
        else:
            state, seen = jax.lax.scan(follow, state, steps)
            scores = rule.scores(seen)
        margin = jnp.zeros(capacities.shape)
        if rule is not None:
            margin = rule.margin + rule.share_margin * capacities.astype(jnp.float32) / num_experts
        serve = partial(_serve, num_experts=num_experts, margin=margin, limit=limit, only_wished=rule is None)
        (resident, last), sums = jax.lax.scan(serve, (resident, last), (steps, scores))
        return (state, resident, last), Totals(*(of.sum(0) for of in sums))

    state = () if rule is None else rule.start(plans.rates[0])
    last = jnp.zeros(resident.shape[1:], bool)  # nothing was wished for yet
    return jax.lax.scan(one_chunk, (state, resident, last), chunks)[1]


def _serve(
    carry: tuple[Bool[Array, "residencies M E"], Bool[Array, "M E"]],
    inputs: tuple[dict[str, Array], Float[Array, "M E"]],
    *,
    num_experts: int,
    margin: Float[Array, "residencies M"],
    limit: int,
    only_wished: bool,
) -> tuple[tuple[Bool[Array, "residencies M E"], Bool[Array, "M E"]], Totals]:
    """Exchange experts, then see what the step's tokens find."""
    (resident, last), (step, scores) = carry, inputs
    loadable = last | step["is_new"] if only_wished else jnp.ones_like(last)
    experts, probs = step["experts"].astype(jnp.int32), step["probs"].astype(jnp.float32)
    is_token = experts[:, 0, 0] < num_experts  # [R]
    at_most = jnp.where(step["is_new"], num_experts, limit) * is_token.any().astype(jnp.int32)
    resident, moved = _exchange(resident, scores, loadable, margin, at_most)
    wished = _counts(experts, num_experts) > 0
    index = jnp.minimum(experts, num_experts - 1)[None]  # [1, R, M, k]
    found = (
        jnp.take_along_axis(resident[:, None], index, axis=-1) | (experts == num_experts)[None]
    )  # [residencies, R, M, k]
    sums = Totals(
        hits=(found & is_token[None, :, None, None]).sum((1, 2, 3)),
        free_tokens=(found.all((2, 3)) & is_token[None]).sum(1),
        missed_weight=jnp.where(found, 0, probs[None]).sum((1, 2, 3)),
        misses=(wished[None] & ~resident).sum((1, 2)),
        moved=moved,
    )
    return (resident, wished), sums


def _exchange(
    resident: Bool[Array, "residencies M E"],
    scores: Float[Array, "M E"],
    loadable: Bool[Array, "M E"],
    margin: Float[Array, "residencies M"],
    at_most: Int[Array, ""],
) -> tuple[Bool[Array, "residencies M E"], Int[Array, " residencies"]]:
    """The best exchange in every layer, until none gains more than its `margin`; returns how many there were."""

    def turn(carry: Any) -> Any:
        resident, moved, turns, _ = carry
        gained = jnp.where(loadable[None] & ~resident, scores[None], -jnp.inf)
        lost = jnp.where(resident, scores[None], jnp.inf)
        most, least = gained.max(-1, keepdims=True), lost.min(-1, keepdims=True)
        gains = most - least > margin[..., None]
        changed = _first(gained == most) | _first(lost == least)
        return resident ^ (changed & gains), moved + gains.sum((1, 2)), turns + 1, gains.any()

    def goes_on(carry: Any) -> Any:
        _, _, turns, gained = carry
        return gained & (turns < at_most)

    none = jnp.zeros(resident.shape[0], jnp.int32)
    resident, moved, _, _ = jax.lax.while_loop(goes_on, turn, (resident, none, 0, jnp.array(True)))
    return resident, moved


def _first(found: Bool[Array, "residencies M E"]) -> Bool[Array, "residencies M E"]:
    """Only the first True of every row. XLA does this several times faster than an argmax."""
    numbers = jnp.arange(found.shape[-1])[None, None]
    return numbers == jnp.where(found, numbers, found.shape[-1]).min(-1, keepdims=True)


def _counts(experts: Int[Array, "R M k"], num_experts: int) -> Int[Array, "M E"]:
    return (experts.astype(jnp.int32)[..., None] == jnp.arange(num_experts)[None, None, None]).sum((0, 2))


def _wished(experts: Int[np.ndarray, "steps R M k"], num_experts: int) -> Bool[np.ndarray, "steps M E"]:
    """Which experts a step wants, however many of its tokens do."""
    T, _, M, _ = experts.shape
    wished = np.zeros((T, M, num_experts + 1), bool)
    wished[np.arange(T)[:, None, None, None], np.arange(M)[None, None, :, None], experts] = True
    return wished[..., :num_experts]
