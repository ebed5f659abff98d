"""The jitted functions of a forward that stops between each layer's router and its experts.

The host loads what is missing there, and no row may be without. A step is cut at its routers: `start_layers` embeds
the tokens, `go_on` leads from there to the first router and from each layer's experts to the next one, `expert_wave`
adds what a layer's experts contribute, a slab-full at a time, and `end_layers` leads from the last of them to the
logits. `stop_at` takes up a whole forward at one of its routers. Between router and experts, `next_wishes` guesses what
the next layer will ask for, where the policy looks ahead.

Only `expert_wave` sees the slab: layers of different capacities share the other executables.

An uncached forward of one sequence goes layer by layer: `embed`, then `attend_and_route`, `expert_wave` and `close_moe`
(or `dense_layer`), then `all_logits`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from emoe_jax.attention import LayerKV
from emoe_jax.config import ModelConfig
from emoe_jax.device.inputs import FlatBatch
from emoe_jax.device.shapes import Shape
from emoe_jax.device.step import Skeleton, StepOutputs, Words, close_step, full_precision
from emoe_jax.device.stops import Routed, Stopped, Stops, uses
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import Decoder, Layer
from emoe_jax.models.rope import Rotation
from emoe_jax.models.routing import Allowances
from emoe_jax.moe import moe_ffn
from emoe_jax.platforms import tracing_for


def _to_router(
    layers: Sequence[Layer],
    x: Float[Array, "1 R D"],
    cache: Sequence[LayerKV | None],
    batch: FlatBatch,
    windows: Sequence[int | None],
    resident: Bool[Array | np.ndarray, " E"],
    budget: Float[Array, " R"],
    config: ModelConfig,
) -> tuple[tuple[Any, ...], Stopped, Routed]:
    """Through layers, of which the last one alone has experts, up to its router's choice."""
    new_cache, last, rotation = [], layers[-1], Rotation.of(batch.positions[None], config)
    for layer, window, pages in zip(layers, windows, cache, strict=True):
        x, pages = layer.attention(x, rotation, batch.attend_function(config, window, pages))
        new_cache.append(pages)
        if layer is not last:
            x = layer.dense(x)
    allowed = jnp.broadcast_to(resident[None, :], (batch.shape.rows, config.num_experts))
    allowances: Allowances = batch.allowances()._replace(budget=budget)
    rows, routing = last.moe_input(x, allowed, batch.valid, allowances)
    stopped = Stopped(x, rows, routing.ids, routing.weights, allowances.after(routing).budget)
    return tuple(new_cache), stopped, Routed.of(routing, batch.valid, config.num_experts)


def _of_layer(routed: Routed, layer: Int[Array, ""], every: Routed) -> Routed:
    """`every` with what is known of one layer."""
    return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0), every, routed)


StoppedAt = tuple[Stopped, Int[Array, " E"], Float[Array, "R D"]]
"""Where a forward stopped; how many assignments each expert has there; and the zeros from which the waves add up: made
on the device, they are placed like the result of a wave, and nothing compiles twice."""


def _at(stopped: Stopped, num_experts: int) -> StoppedAt:
    """With the experts' uses, and zeros."""
    return stopped, uses(stopped.ids, num_experts), jnp.zeros_like(stopped.rows)


@partial(jax.jit, static_argnames=("skeleton", "config", "shape"))
def start_layers(
    leaves: tuple[Array, ...],
    inputs: Words,
    last_tokens: Int[Array, " places"],
    *,
    skeleton: Skeleton,
    config: ModelConfig,
    shape: Shape,
) -> tuple[Stopped, Float[Array, "R D"], Routed]:
    """From the tokens to what `go_on` needs to reach the first router. The `Routed` has room for all layers."""
    batch, k = FlatBatch.unpack(inputs, shape), config.top_k
    x = skeleton.join(leaves).embed(batch.tokens(last_tokens))
    R = shape.rows
    none = jnp.zeros((R, k), jnp.int32), jnp.zeros((R, k), jnp.float32)
    stopped = Stopped(x, jnp.zeros_like(x[0]), *none, batch.allowances().budget)
    return stopped, jnp.zeros_like(x[0]), Routed.blank(config, R)


@partial(
    jax.jit, static_argnames=("skeletons", "config", "windows", "shape", "platform"), donate_argnames=("total", "cache")
)
def go_on(
    leaves: tuple[tuple[Array, ...], ...],
    stopped: Stopped,
    total: Float[Array, "R D"],
    cache: tuple[LayerKV, ...],
    inputs: Words,
    resident: Bool[Array | np.ndarray, " E"],
    every: Routed,
    layer: Int32[Array | np.ndarray, ""],
    *,
    skeletons: tuple[Skeleton, ...],
    config: ModelConfig,
    windows: tuple[int | None, ...],
    shape: Shape,
    platform: str | None = None,
) -> tuple[tuple[LayerKV, ...], StoppedAt, Routed]:
    """From what the experts of one layer add up to, to the next router: the rest of that layer, then the others.

    `stopped` and `total` are of the first of these layers, `cache` and `windows` of the others, of which the last one
    is MoE layer number `layer`. Number 0 has no layer with experts before it: whatever stands there changes nothing.
    Routers choose among the `resident` experts, and those that a row may not be without. Donates `total` and `cache`.
    """
    first, *others = (skeleton.join(part) for skeleton, part in zip(skeletons, leaves, strict=True))
    batch = FlatBatch.unpack(inputs, shape)
    with full_precision(total.dtype), tracing_for(platform):
        x = jnp.where(jnp.asarray(layer) == 0, stopped.x, first.moe_output(stopped.x, stopped.rows, total))
        arguments = (x, cache, batch, windows, resident, stopped.budget, config)
        new_cache, stopped, routed = _to_router(others, *arguments)
    return new_cache, _at(stopped, config.num_experts), _of_layer(routed, jnp.asarray(layer), every)


@partial(jax.jit, static_argnames=("skeleton", "config", "shape", "platform"), donate_argnames=("cache",))
def end_layers(
    leaves: tuple[Array, ...],
    stopped: Stopped,
    total: Float[Array, "R D"],
    cache: tuple[LayerKV, ...],
    inputs: Words,
    every: Routed,
    last_tokens: Int[Array, " places"],
    *,
    skeleton: Skeleton,
    config: ModelConfig,
    shape: Shape,
    platform: str | None = None,
) -> tuple[tuple[LayerKV, ...], StepOutputs]:
    """What `whole_step` returns, from what the last experts add up to. Donates `cache`, that of the layers behind."""
    model: Decoder = skeleton.join(leaves)
    batch, last = FlatBatch.unpack(inputs, shape), config.moe_layers[-1]
    layers, new_cache = list(model.layers), []
    with full_precision(total.dtype), tracing_for(platform):
        x = layers[last].moe_output(stopped.x, stopped.rows, total)
        for index, pages in enumerate(cache, last + 1):
            attend_fn = batch.attend_function(config, config.sliding_window(index), pages)
            x, pages = layers[index].attention(x, Rotation.of(batch.positions[None], config), attend_fn)
            new_cache.append(pages)
            x = layers[index].dense(x)
        return tuple(new_cache), close_step(model, batch, x, every, last_tokens, config)


@jax.jit
def stop_at(stops: Stops, layer: Int32[Array | np.ndarray, ""]) -> StoppedAt:
    """Where a whole forward passed the router of a MoE layer."""
    stopped = jax.tree.map(lambda part: part[jnp.asarray(layer)], stops.stopped)
    return _at(stopped, stops.routed.needed.shape[-1])


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
) -> tuple[LayerKV | None, StoppedAt]:
    """One MoE layer up to its router's choice, as `go_on`.

    Donates `cache`; with `cache=None` a single sequence attends to itself only.
    """
    layer: Layer = skeleton.join(leaves)
    batch = FlatBatch.unpack(inputs, shape)
    with full_precision(x.dtype), tracing_for(platform):
        (cache,), stopped, _ = _to_router([layer], x, [cache], batch, [window], resident, budget, config)
    return cache, _at(stopped, config.num_experts)


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
        rotation = Rotation.of(batch.positions[None], config)
        x, cache = layer.attention(x, rotation, batch.attend_function(config, window, cache))
        return cache, layer.dense(x)


@partial(jax.jit, static_argnames=("skeleton", "platform"))
def all_logits(
    leaves: tuple[Array, ...], x: Float[Array, "1 R D"], *, skeleton: Skeleton, platform: str | None = None
) -> Float[Array, "R V"]:
    """Float32 logits of every row."""
    with full_precision(x.dtype), tracing_for(platform):
        return skeleton.join(leaves).logits(x[0])
