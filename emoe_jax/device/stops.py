"""What a forward leaves at its routers: where it goes on once the experts that were chosen there have come."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.models.routing import Routing


class Routed(NamedTuple):
    """What is kept of the routers' choices in MoE layers; fields of one layer have no axis `M`."""

    ranked: Int[Array, "*M R ranks"]
    """Unfiltered, best first: the wishes, and what ranks next where a trace is to hold that."""
    probs: Float[Array, "*M R ranks"]
    """Their probabilities in the dtype of a routing trace. They stay on the device unless a recorder asks for them."""
    wish_counts: Int[Array, "*M E"]
    needed: Bool[Array, "*M E"]
    """Which experts a row wishes for and may not be without: where one was absent, the layer's output is void."""
    substituted_choices: Int[Array, "*M R"]
    substituted_weight: Float[Array, "*M R"]
    """Of the wishes' weight, the share of those that were substituted."""

    @classmethod
    def of(cls, routing: Routing, valid: Bool[Array, " R"], num_experts: int) -> "Routed":
        """Of one layer. Padding rows, and those whose router computed NaN, count for no expert."""
        counts = jnp.zeros((num_experts,), jnp.int32)
        counted = (valid & routing.known)[:, None]
        wished = jnp.where(counted, routing.wish_ids, num_experts)
        needed = jnp.where(counted & ~routing.substituted, routing.wish_ids, num_experts)
        return cls(
            routing.ranked_ids,
            routing.ranked_probs.astype(jnp.float16),
            counts.at[wished.reshape(-1)].add(1, mode="drop"),
            counts.at[needed.reshape(-1)].add(1, mode="drop") > 0,
            jnp.sum(routing.substituted, axis=-1, dtype=jnp.int32),
            routing.substituted_weight,
        )

    @classmethod
    def blank(cls, config: ModelConfig, R: int) -> "Routed":
        """Of all MoE layers, before any of them."""
        M, E, ranked = len(config.moe_layers), config.num_experts, (len(config.moe_layers), R, config.ranks)
        return cls(
            jnp.zeros(ranked, jnp.int32),
            jnp.zeros(ranked, jnp.float16),
            jnp.zeros((M, E), jnp.int32),
            jnp.zeros((M, E), jnp.bool_),
            jnp.zeros((M, R), jnp.int32),
            jnp.zeros((M, R), jnp.float32),
        )


class Stopped(NamedTuple):
    """A layer stopped between router and experts. Fields of several layers have an axis `M` in front."""

    x: Float[Array, "*M 1 R D"]
    rows: Float[Array, "*M R D"]
    ids: Int[Array, "*M R k"]
    """Of absent experts, too, where a row may not be without."""
    weights: Float[Array, "*M R k"]
    budget: Float[Array, "*M R"]
    """What the layers that follow may substitute of each row."""


class Stops(NamedTuple):
    """Where a whole forward passed its routers. What lies behind a layer that missed an expert is void."""

    stopped: Stopped
    """Of every MoE layer."""
    routed: Routed


def uses(ids: Int[Array, "R k"], num_experts: int) -> Int[Array, " E"]:
    """How many assignments each expert has."""
    return jnp.zeros((num_experts,), jnp.int32).at[ids.reshape(-1)].add(1, mode="drop")


def stacked(stopped: list[Stopped]) -> Stopped:
    """Several layers in one."""
    return jax.tree.map(lambda *layers: jnp.stack(layers), *stopped)
