"""The parts of a layer that a whole step calls, so that XLA:CPU optimises one for all layers of a kind.

XLA would inline these calls and optimise the step layer by layer, which takes longer the more layers there are. On a
CPU a mark on each call has it optimise what is called apart, once, and put the result in the place of every call. New
keys and values are written between the calls: a unit cannot change pages in place.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.attention import KVView, LayerKV
from emoe_jax.config import ModelConfig
from emoe_jax.device.inputs import attend_in_groups
from emoe_jax.device.stops import Routed, Stopped
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import Layer
from emoe_jax.models.rope import Rotation
from emoe_jax.models.routing import Allowances
from emoe_jax.moe import moe_ffn
from emoe_jax.platforms import default_platform, tracing_for

Outputs = TypeVar("Outputs")


def call(unit: Callable[..., Outputs], *arguments: Any, **statics: Any) -> Outputs:
    """Call one of the units below; on a CPU with the mark."""
    outputs = unit(*arguments, **statics)
    if default_platform() != "cpu":
        return outputs
    leaves, tree = jax.tree.flatten(outputs)
    leaves[0] = set_xla_metadata(leaves[0], inlineable="false", compilation_unit=unit.__name__)
    return jax.tree.unflatten(tree, leaves)


@jax.jit
def project(
    layer: Layer, x: Float[Array, "1 R D"], rotation: Rotation
) -> tuple[Float[Array, "1 R N H"], Float[Array, "1 R K H"], Float[Array, "1 R K Hv"]]:
    """Queries, keys and values of a layer."""
    return layer.project(x, rotation)


@partial(jax.jit, static_argnames=("config", "window", "platform"))
def dense(
    layer: Layer,
    x: Float[Array, "1 R D"],
    q: Float[Array, "1 R N H"],
    pages: LayerKV,
    views: Sequence[KVView],
    *,
    config: ModelConfig,
    window: int | None,
    platform: str,
) -> Float[Array, "1 R D"]:
    """The rest of a layer without experts. `pages` hold the new keys and values."""
    with tracing_for(platform):
        return layer.dense(_attended(layer, x, q, pages, views, config, window))


@partial(jax.jit, static_argnames=("config", "window", "platform"))
def moe(
    layer: Layer,
    x: Float[Array, "1 R D"],
    q: Float[Array, "1 R N H"],
    pages: LayerKV,
    views: Sequence[KVView],
    slots: Int[Array, " E"],
    experts: ExpertWeights,
    valid: Bool[Array, " R"],
    allowances: Allowances,
    *,
    config: ModelConfig,
    window: int | None,
    platform: str,
) -> tuple[Float[Array, "1 R D"], Stopped, Routed]:
    """The rest of a layer with experts, and what its router chose. `pages` hold the new keys and values."""
    with tracing_for(platform):
        x = _attended(layer, x, q, pages, views, config, window)
        allowed = None
        if experts.capacity < config.num_experts:
            allowed = jnp.broadcast_to((slots < experts.capacity)[None, :], (len(valid), config.num_experts))
        rows, routing = layer.moe_input(x, allowed, valid, allowances)
        stopped = Stopped(x, rows, routing.ids, routing.weights, allowances.after(routing).budget)
        out = moe_ffn(rows, routing.ids, routing.weights, slots, experts, config)
        return layer.moe_output(x, rows, out), stopped, Routed.of(routing, valid, config.num_experts)


def _attended(
    layer: Layer,
    x: Float[Array, "1 R D"],
    q: Float[Array, "1 R N H"],
    pages: LayerKV,
    views: Sequence[KVView],
    config: ModelConfig,
    window: int | None,
) -> Float[Array, "1 R D"]:
    with jax.named_scope("attention"):
        attended = attend_in_groups(q, pages, views, config, window, layer.sinks)
    return layer.attended(x, attended)
