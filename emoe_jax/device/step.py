"""The jitted functions of a step, pure over the weights, the slab and the KV cache.

`resident_step` is a whole forward in one call. The `exact` contract stops between each layer's router and its experts
so that the host can load what is missing: `embed`, then per layer `attend_and_route`, `expert_wave` (once per wave)
and `close_moe` (or `dense_layer`), then `last_logits`. Between router and experts, `next_wishes` guesses what the next
layer will ask for, where the policy looks ahead. Without a cache the same pieces make an uncached forward.
`choose_tokens` follows either, compiled twice per batch size (with and without penalties), and `prompt_logprobs` where
a request asks for them. Tokens are kept on the device, where the next step finds those that the host has not read yet.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from emoe_jax.attention.paged import KVView, LayerKV, paged_attend
from emoe_jax.attention.uncached import causal_attend
from emoe_jax.config import ModelConfig
from emoe_jax.device.kv_cache import KVCache
from emoe_jax.device.sampler import Sampled, SamplingArrays, TokenLogprobs, sample, token_logprobs
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import AttendFunction, Decoder, Layer
from emoe_jax.models.routing import Routing, Substituted, substituted
from emoe_jax.moe import moe_ffn
from emoe_jax.traces.parts import expert_dtype

PROMPT_ROWS = 32
"""Rows of a prompt whose logits exist together while their log probabilities are computed."""


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A module without its weights: what a jitted function needs, statically, to put the leaves back into it."""

    graph: nnx.GraphDef
    tree: Any

    @classmethod
    def split(cls, module: nnx.Module) -> tuple["Skeleton", tuple[Array, ...]]:
        """The skeleton of a module and its weights as a flat tuple, the cheapest argument there is to dispatch."""
        graph, state = nnx.split(module)
        leaves, tree = jax.tree.flatten(state)
        return cls(graph, tree), tuple(leaves)

    def join(self, leaves: Sequence[Array]) -> Any:
        """The module with these leaves as its weights, in the order in which they were split off. Copies nothing."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """A padded batch: `lengths` new tokens of each sequence, the first at position `starts`. Built on the host.

    A token of `-1 - p` is the one at place `p` of the `last_tokens` that earlier steps sampled.
    """

    tokens: Int[Array | np.ndarray, "B T"]
    starts: Int[Array | np.ndarray, " B"]
    lengths: Int[Array | np.ndarray, " B"]
    block_tables: Int[Array | np.ndarray, "B pages_per_sequence"]

    def view(self) -> KVView:
        """The positions `[B, T]` of the new tokens, which of them are no padding, and where their pages are."""
        offsets = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None, :]
        return KVView(
            jnp.asarray(self.starts)[:, None] + offsets,
            offsets < self.lengths[:, None],
            jnp.asarray(self.block_tables),
        )


class Wishes(NamedTuple):
    """The routers' unfiltered choices, best first, in the dtypes of a routing trace (padding rows included).

    `probs` stay on the device unless a recorder asks for them. Fields of one layer have no axis `M`.
    """

    experts: Shaped[Array | np.ndarray, "*M R k"]
    probs: Float[Array | np.ndarray, "*M R k"] | None

    @classmethod
    def of(cls, routing: Routing, num_experts: int) -> "Wishes":
        """The wishes of one layer. Probabilities become float16, and ids the smallest dtype for `num_experts`."""
        return cls(routing.wish_ids.astype(expert_dtype(num_experts)), routing.wish_probs.astype(jnp.float16))


class StepOutputs(NamedTuple):
    """Hidden states of all tokens, logits of each sequence's last one, what the routers wished for, and what of it was
    substituted.
    """

    hidden: Float[Array, "B T D"]
    logits: Float[Array, "B V"]
    wish_counts: Int[Array | np.ndarray, "M E"]
    substituted: Substituted
    """By sequence, summed over its new tokens and all layers."""
    finite: Bool[Array, " B"]
    """By sequence: whether the last hidden states of its new tokens, and its logits, are finite."""
    wishes: Wishes | list[Wishes]
    """Of all MoE layers, or a list by layer."""


class Routed(NamedTuple):
    """A layer stopped between router and experts. `wish_counts` says which experts the rows ask for."""

    x: Float[Array, "B T D"]
    rows: Float[Array, "R D"]
    ids: Int[Array, "R k"]
    weights: Float[Array, "R k"]
    wish_counts: Int[Array, " E"]


def _with_last_tokens(tokens: Int[Array | np.ndarray, "B T"], last_tokens: Int[Array, " places"]) -> Int[Array, "B T"]:
    tokens = jnp.asarray(tokens)
    return jnp.where(tokens < 0, last_tokens.at[-1 - tokens].get(mode="clip"), tokens)


def _wish_counts(routing: Routing, valid: Bool[Array, " R"], num_experts: int) -> Int[Array, " E"]:
    wishes = jnp.where((valid & routing.known)[:, None], routing.wish_ids, num_experts)
    return jnp.zeros((num_experts,), jnp.int32).at[wishes.reshape(-1)].add(1, mode="drop")


def _attend_function(config: ModelConfig, window: int | None, cache: LayerKV | None, view: KVView) -> AttendFunction:
    if cache is None:
        return causal_attend(config, window, view.positions)
    return paged_attend(config, window, cache, view)


def _last_hidden(x: Float[Array, "B T D"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
    last = jnp.maximum(lengths - 1, 0)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def _all_finite(x: Float[Array, "B T D"], valid: Bool[Array, "B T"], logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """A key, value or router logit that is NaN makes its token's residual stream NaN, which stays so to the end."""
    tokens = jnp.all(jnp.isfinite(x), axis=-1) | ~valid
    return jnp.all(tokens, axis=-1) & jnp.all(jnp.isfinite(logits), axis=-1)


@partial(jax.jit, static_argnames=("skeleton", "config"), donate_argnames=("cache",))
def resident_step(
    leaves: tuple[Array, ...],
    experts: tuple[ExpertWeights, ...],
    slots: Int[Array, "M E"],
    cache: KVCache,
    inputs: StepInputs,
    last_tokens: Int[Array, " places"],
    *,
    skeleton: Skeleton,
    config: ModelConfig,
) -> tuple[KVCache, StepOutputs]:
    """A forward under the `resident` contract: routers choose among resident experts only. Donates `cache`."""
    model: Decoder = skeleton.join(leaves)
    view = inputs.view()
    B, T = inputs.tokens.shape
    valid = view.valid.reshape(-1)
    x = model.embed(_with_last_tokens(inputs.tokens, last_tokens))
    new_cache: list[LayerKV] = []
    counts: list[Array] = []
    wishes: list[Wishes] = []
    replaced: list[Substituted] = []
    for index, layer in enumerate(model.layers):
        attend_fn = paged_attend(config, config.sliding_window(index), cache[index], view)
        x, layer_cache = layer.attention(x, view.positions, attend_fn)
        new_cache.append(layer_cache)
        if not config.is_moe(index):
            x = layer.dense(x)
            continue
        m = len(counts)
        allowed = None
        if experts[m].capacity < config.num_experts:
            allowed = jnp.broadcast_to((slots[m] < experts[m].capacity)[None, :], (B * T, config.num_experts))
        rows, routing = layer.moe_input(x, allowed, valid)
        out = moe_ffn(rows, routing.ids, routing.weights, slots[m], experts[m], config)
        x = layer.moe_output(x, rows, out)
        counts.append(_wish_counts(routing, valid, config.num_experts))
        wishes.append(Wishes.of(routing, config.num_experts))
        replaced.append(substituted(routing, config.num_experts))
    logits = model.logits(_last_hidden(x, jnp.asarray(inputs.lengths)))
    stacked = Wishes(*(jnp.stack(field) for field in zip(*wishes, strict=True)))
    missed = Substituted(
        *(jnp.sum(jnp.stack(field).reshape(-1, B, T), axis=(0, 2)) for field in zip(*replaced, strict=True))
    )
    finite = _all_finite(x, view.valid, logits)
    return tuple(new_cache), StepOutputs(x, logits, jnp.stack(counts), missed, finite, stacked)


@partial(jax.jit, static_argnames=("skeleton",))
def embed(
    leaves: tuple[Array, ...],
    tokens: Int[Array | np.ndarray, "B T"],
    last_tokens: Int[Array, " places"],
    *,
    skeleton: Skeleton,
) -> Float[Array, "B T D"]:
    """Embeddings of a padded batch. A token of `-1 - p` is first replaced by the one at place `p` of `last_tokens`."""
    return skeleton.join(leaves).embed(_with_last_tokens(tokens, last_tokens))


@partial(jax.jit, static_argnames=("skeleton", "config", "window", "restricted"), donate_argnames=("cache",))
def attend_and_route(
    leaves: tuple[Array, ...],
    x: Float[Array, "B T D"],
    cache: LayerKV | None,
    inputs: StepInputs,
    resident: Bool[Array | np.ndarray, " E"],
    *,
    skeleton: Skeleton,
    config: ModelConfig,
    window: int | None,
    restricted: bool,
) -> tuple[LayerKV | None, Routed, Float[Array, "R D"], Wishes]:
    """A MoE layer up to its router's choice: among the `resident` experts when `restricted`, else among all.

    Donates `cache`; with `cache=None` the sequences attend to themselves only. Also returns the zeros from which the
    first `expert_wave` accumulates: made here, they are placed like the result of a wave and nothing compiles twice.
    """
    layer: Layer = skeleton.join(leaves)
    view = inputs.view()
    x, cache = layer.attention(x, view.positions, _attend_function(config, window, cache, view))
    valid = view.valid.reshape(-1)
    allowed = jnp.broadcast_to(resident[None, :], (valid.shape[0], config.num_experts)) if restricted else None
    rows, routing = layer.moe_input(x, allowed, valid)
    counts = _wish_counts(routing, valid, config.num_experts)
    routed = Routed(x, rows, routing.ids, routing.weights, counts)
    return cache, routed, jnp.zeros_like(rows), Wishes.of(routing, config.num_experts)


@partial(jax.jit, static_argnames=("skeleton", "config"))
def next_wishes(
    leaves: tuple[Array, ...],
    x: Float[Array, "B T D"],
    lengths: Int[Array | np.ndarray, " B"],
    *,
    skeleton: Skeleton,
    config: ModelConfig,
) -> Int[Array, " E"]:
    """How often the router of this MoE layer would wish for each expert if `x` were its input (Pre-gated MoE).

    `x` is `Routed.x` of the MoE layer before, which is known before that layer's experts have run.
    """
    layer: Layer = skeleton.join(leaves)
    valid = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < jnp.asarray(lengths)[:, None]
    _, routing = layer.moe_input(x)
    return _wish_counts(routing, valid.reshape(-1), config.num_experts)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("accumulator",))
def expert_wave(
    routed: Routed,
    slots: Int[Array | np.ndarray, " E"],
    experts: ExpertWeights,
    accumulator: Float[Array, "R D"],
    *,
    config: ModelConfig,
) -> Float[Array, "R D"]:
    """Add what the experts in `slots` contribute. Experts of other waves have slot `C`. Donates `accumulator`."""
    slots = jnp.asarray(slots)
    return moe_ffn(routed.rows, routed.ids, routed.weights, slots, experts, config, accumulator=accumulator)


@partial(jax.jit, static_argnames=("skeleton",))
def close_moe(
    leaves: tuple[Array, ...], routed: Routed, experts_out: Float[Array, "R D"], *, skeleton: Skeleton
) -> Float[Array, "B T D"]:
    """The rest of a MoE layer after all waves."""
    return skeleton.join(leaves).moe_output(routed.x, routed.rows, experts_out)


@partial(jax.jit, static_argnames=("skeleton", "config", "window"), donate_argnames=("cache",))
def dense_layer(
    leaves: tuple[Array, ...],
    x: Float[Array, "B T D"],
    cache: LayerKV | None,
    inputs: StepInputs,
    *,
    skeleton: Skeleton,
    config: ModelConfig,
    window: int | None,
) -> tuple[LayerKV | None, Float[Array, "B T D"]]:
    """A whole layer without experts. Donates `cache`."""
    layer: Layer = skeleton.join(leaves)
    view = inputs.view()
    x, cache = layer.attention(x, view.positions, _attend_function(config, window, cache, view))
    return cache, layer.dense(x)


@partial(jax.jit, static_argnames=("skeleton",))
def last_logits(
    leaves: tuple[Array, ...], x: Float[Array, "B T D"], lengths: Int[Array | np.ndarray, " B"], *, skeleton: Skeleton
) -> tuple[Float[Array, "B V"], Bool[Array, " B"]]:
    """Float32 logits of the last token of each sequence, and whether all that it computed is finite."""
    lengths = jnp.asarray(lengths)
    logits = skeleton.join(leaves).logits(_last_hidden(x, lengths))
    valid = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
    return logits, _all_finite(x, valid, logits)


@partial(jax.jit, static_argnames=("skeleton",))
def all_logits(leaves: tuple[Array, ...], x: Float[Array, "B T D"], *, skeleton: Skeleton) -> Float[Array, "B T V"]:
    """Float32 logits of every position."""
    return skeleton.join(leaves).logits(x)


@partial(jax.jit, static_argnames=("skeleton",))
def prompt_logprobs(
    leaves: tuple[Array, ...],
    x: Float[Array, "1 T D"],
    targets: Int[Array | np.ndarray, " T"],
    *,
    skeleton: Skeleton,
) -> TokenLogprobs:
    """How probable each target was after the hidden states of the same row, a few rows of logits at a time."""
    model: Decoder = skeleton.join(leaves)

    def of_row(row: tuple[Float[Array, " D"], Int[Array, ""]]) -> TokenLogprobs:
        return jax.tree.map(lambda field: field[0], token_logprobs(model.logits(row[0][None]), row[1][None]))

    return jax.lax.map(of_row, (x[0], jnp.asarray(targets)), batch_size=min(PROMPT_ROWS, x.shape[1]))


@jax.jit
def choose_tokens(
    logits: Float[Array, "B V"],
    sampling: SamplingArrays,
    want_logprobs: Bool[Array | np.ndarray, ""],
    last_tokens: Int[Array, " places"],
    places: Int[Array | np.ndarray, " B"],
) -> tuple[Sampled, Int[Array, " places"]]:
    """The next tokens, and `last_tokens` with them at `places`; the number of places is no place."""
    sampled = sample(logits, sampling, jnp.asarray(want_logprobs))
    return sampled, last_tokens.at[places].set(sampled.tokens, mode="drop")
