"""The jitted functions of a forward that stops between each layer's router and its experts.

The host loads what is missing there, and no row may be without: `embed`, then per layer `attend_and_route`,
`expert_wave` (once per wave) and `close_moe` (or `dense_layer`), then `close_layers`. Between router and experts,
`next_wishes` guesses what the next layer will ask for, where the policy looks ahead. Without a cache the same functions
make an uncached forward of one sequence, which ends with `all_logits`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.attention import LayerKV
from emoe_jax.config import ModelConfig
from emoe_jax.device.inputs import FlatBatch
from emoe_jax.device.shapes import Shape
from emoe_jax.device.step import Routed, Skeleton, StepOutputs, Words, close_step, full_precision
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import Decoder, Layer
from emoe_jax.moe import moe_ffn
from emoe_jax.platforms import tracing_for


class Stopped(NamedTuple):
    """A layer stopped between router and experts."""

    x: Float[Array, "1 R D"]
    rows: Float[Array, "R D"]
    ids: Int[Array, "R k"]
    weights: Float[Array, "R k"]
    used: Int[Array, " E"]
    """How many assignments each expert has: of absent ones, too, where a row may not be without."""
    budget: Float[Array, " R"]
    """What the layers that follow may substitute of each row."""
    routed: Routed


@partial(jax.jit, static_argnames=("skeleton", "shape"))
def embed(
    leaves: tuple[Array, ...],
    inputs: Words,
    last_tokens: Int[Array, " places"],
    *,
    skeleton: Skeleton,
    shape: Shape,
) -> tuple[Float[Array, "1 R D"], Float[Array, " R"]]:
    """Embeddings of a batch's tokens, and the budgets of its rows."""
    batch = FlatBatch.unpack(inputs, shape)
    return skeleton.join(leaves).embed(batch.tokens(last_tokens)), batch.allowances().budget


@partial(
    jax.jit,
    static_argnames=("skeleton", "config", "window", "shape", "platform"),
    donate_argnames=("cache",),
)
def attend_and_route(
    leaves: tuple[Array, ...],
    x: Float[Array, "1 R D"],
    cache: LayerKV | None,
    inputs: Words,
    resident: Bool[Array | np.ndarray, " E"],
    budget: Float[Array, " R"],
    *,
    skeleton: Skeleton,
    config: ModelConfig,
    window: int | None,
    shape: Shape,
    platform: str | None = None,
) -> tuple[LayerKV | None, Stopped, Float[Array, "R D"]]:
    """A MoE layer up to its router's choice: among the `resident` experts, and those that a row may not be without.

    Donates `cache`; with `cache=None` a single sequence attends to itself only. Also returns the zeros from which the
    first `expert_wave` accumulates: made here, they are placed like the result of a wave and nothing compiles twice.
    """
    layer: Layer = skeleton.join(leaves)
    batch = FlatBatch.unpack(inputs, shape)
    with full_precision(x.dtype), tracing_for(platform):
        x, cache = layer.attention(x, batch.positions[None], batch.attend_function(config, window, cache))
        allowed = jnp.broadcast_to(resident[None, :], (shape.rows, config.num_experts))
        allowances = batch.allowances()._replace(budget=budget)
        rows, routing = layer.moe_input(x, allowed, batch.valid, allowances)
    used = jnp.zeros((config.num_experts,), jnp.int32).at[routing.ids.reshape(-1)].add(1, mode="drop")
    routed = Routed.of(routing, batch.valid, config.num_experts)
    stopped = Stopped(x, rows, routing.ids, routing.weights, used, allowances.after(routing).budget, routed)
    return cache, stopped, jnp.zeros_like(rows)


@partial(jax.jit, static_argnames=("skeleton", "config", "shape"))
def next_wishes(
    leaves: tuple[Array, ...],
    x: Float[Array, "1 R D"],
    inputs: Words,
    *,
    skeleton: Skeleton,
    config: ModelConfig,
    shape: Shape,
) -> Int[Array, " E"]:
    """How often the router of this MoE layer would wish for each expert if `x` were its input (Pre-gated MoE).

    `x` is `Stopped.x` of the MoE layer before, which is known before that layer's experts have run.
    """
    layer: Layer = skeleton.join(leaves)
    with full_precision(x.dtype):
        _, routing = layer.moe_input(x)
    return Routed.of(routing, FlatBatch.unpack(inputs, shape).valid, config.num_experts).wish_counts


@partial(jax.jit, static_argnames=("config", "platform"), donate_argnames=("accumulator",))
def expert_wave(
    stopped: Stopped,
    slots: Int[Array | np.ndarray, " E"],
    experts: ExpertWeights,
    accumulator: Float[Array, "R D"],
    *,
    config: ModelConfig,
    platform: str | None = None,
) -> Float[Array, "R D"]:
    """Add what the experts in `slots` contribute. Experts of other waves have slot `C`. Donates `accumulator`."""
    rows, ids, weights = stopped.rows, stopped.ids, stopped.weights
    with full_precision(rows.dtype), tracing_for(platform):
        return moe_ffn(rows, ids, weights, jnp.asarray(slots), experts, config, accumulator=accumulator)


@partial(jax.jit, static_argnames=("skeleton", "platform"))
def close_moe(
    leaves: tuple[Array, ...],
    stopped: Stopped,
    experts_out: Float[Array, "R D"],
    *,
    skeleton: Skeleton,
    platform: str | None = None,
) -> Float[Array, "1 R D"]:
    """The rest of a MoE layer after all waves."""
    with full_precision(experts_out.dtype), tracing_for(platform):
        return skeleton.join(leaves).moe_output(stopped.x, stopped.rows, experts_out)


@partial(jax.jit, static_argnames=("skeleton", "config", "window", "shape", "platform"), donate_argnames=("cache",))
def dense_layer(
    leaves: tuple[Array, ...],
    x: Float[Array, "1 R D"],
    cache: LayerKV | None,
    inputs: Words,
    *,
    skeleton: Skeleton,
    config: ModelConfig,
    window: int | None,
    shape: Shape,
    platform: str | None = None,
) -> tuple[LayerKV | None, Float[Array, "1 R D"]]:
    """A whole layer without experts. Donates `cache`."""
    layer: Layer = skeleton.join(leaves)
    batch = FlatBatch.unpack(inputs, shape)
    with full_precision(x.dtype), tracing_for(platform):
        x, cache = layer.attention(x, batch.positions[None], batch.attend_function(config, window, cache))
        return cache, layer.dense(x)


@partial(jax.jit, static_argnames=("skeleton", "config", "shape", "platform"))
def close_layers(
    leaves: tuple[Array, ...],
    x: Float[Array, "1 R D"],
    inputs: Words,
    routed: tuple[Routed, ...],
    last_tokens: Int[Array, " places"],
    *,
    skeleton: Skeleton,
    config: ModelConfig,
    shape: Shape,
    platform: str | None = None,
) -> StepOutputs:
    """What `whole_step` returns, from the output of the last layer and what was kept of each MoE layer."""
    model: Decoder = skeleton.join(leaves)
    with full_precision(x.dtype), tracing_for(platform):
        return close_step(model, FlatBatch.unpack(inputs, shape), x, routed, last_tokens, config)


@partial(jax.jit, static_argnames=("skeleton", "platform"))
def all_logits(
    leaves: tuple[Array, ...], x: Float[Array, "1 R D"], *, skeleton: Skeleton, platform: str | None = None
) -> Float[Array, "R V"]:
    """Float32 logits of every row."""
    with full_precision(x.dtype), tracing_for(platform):
        return skeleton.join(leaves).logits(x[0])
