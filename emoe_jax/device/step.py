"""The jitted functions of a step, pure over the weights, the slab and the KV cache.

`whole_step` is a forward in one call, and takes the most probable tokens. Where a sequence asks for another choice,
`edit_logits`, `mask_logits`, `filter_logits`, `choose_tokens` and `chosen_logprobs` follow, each only where it is
needed. `prompt_logprobs` is for prompts. The forward that stops at every router is in `layer_steps`.

No function has a condition or a loop of unknown length, which would make a GPU wait for the host: the host picks the
functions, and lengths are masks. Tokens are kept on the device, where the next step finds those that the host has not
read yet.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32, Shaped, UInt32

from emoe_jax.attention import LayerKV, write
from emoe_jax.config import ModelConfig
from emoe_jax.device import units
from emoe_jax.device.adjustments import TokenEdits, only_allowed
from emoe_jax.device.block_tables import NewPages
from emoe_jax.device.inputs import FlatBatch
from emoe_jax.device.kv_cache import KVCache
from emoe_jax.device.report import Report
from emoe_jax.device.sampler import FILTERS, SamplingArrays, TokenLogprobs, most_probable, sample, token_logprobs
from emoe_jax.device.shapes import Shape
from emoe_jax.device.stops import Routed, Stopped, Stops, stacked
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import Decoder
from emoe_jax.models.rope import Rotation
from emoe_jax.platforms import default_platform, tracing_for
from emoe_jax.requests.served import MOST_KEPT
from emoe_jax.scheduling.pages import TRASH_PAGE

ROWS_TAKEN = MOST_KEPT
"""Rows of hidden states that are taken in one call: those of a text that is audited, or so many of a prompt."""

Words = Int32[Array | np.ndarray, " words"]
"""A buffer that a `Packing` laid out."""


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A module without its weights: what a jitted function needs, statically, to put the leaves back into it."""

    graph: nnx.GraphDef
    tree: Any
    places: tuple[tuple[int, int | None], ...]
    """By weight: the leaf that holds it, and the row of that leaf where it shares one."""

    @classmethod
    def split(cls, module: nnx.Module) -> tuple["Skeleton", tuple[Array, ...]]:
        """The skeleton of a module and its weights as a flat tuple, the cheapest argument there is to dispatch.

        Every leaf costs time at each call. So vectors of one length and dtype, such as the norms of all layers, become
        rows of one leaf; they are few numbers, and what a function reads of them is copied.
        """
        graph, state = nnx.split(module)
        weights, tree = jax.tree.flatten(state)
        leaves: list[list[Array]] = []
        shared: dict[tuple[Any, ...], int] = {}
        places: list[tuple[int, int | None]] = []
        for weight in weights:
            kind = (weight.shape, weight.dtype)
            if weight.ndim != 1 or kind not in shared:
                shared[kind] = len(leaves)
                leaves.append([])
            index = shared[kind] if weight.ndim == 1 else len(leaves) - 1
            places.append((index, len(leaves[index]) if weight.ndim == 1 else None))
            leaves[index].append(weight)
        rows = {index for index, row in places if row is not None}
        stacked = tuple(_stacked(parts) if index in rows else parts[0] for index, parts in enumerate(leaves))
        return cls(graph, tree, tuple(places)), stacked

    def join(self, leaves: Sequence[Array]) -> Any:
        """The module with these leaves as its weights, in the order in which they were split off. Copies no matrix."""
        weights = [leaves[index] if row is None else leaves[index][row] for index, row in self.places]
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, weights))


def _stacked(vectors: list[Array]) -> Array:
    if any(isinstance(vector, jax.ShapeDtypeStruct) for vector in vectors):
        return jax.eval_shape(lambda *parts: jnp.stack(parts), *vectors)
    return jnp.stack(vectors)


class StepOutputs(NamedTuple):
    """What a forward leaves on the device. The host reads `report`."""

    hidden: Float[Array, "1 R D"]
    logits: Float[Array, "B V"]
    report: Int32[Array, " words"]
    ranked_probs: Float[Array, "M R ranks"]
    last_tokens: Int[Array, " places"]
    """With the most probable token of every sequence at its place."""
    stops: Stops | None = None
    """Where it may be taken up again: of a whole forward that may miss experts, and whose rows are few (`keeps_stops`).
    """


def keeps_stops(shape: Shape) -> bool:
    """Whether a whole forward keeps its state at every router: not that of prompts, which would take much memory."""
    return shape.tiles == 0


def full_precision(dtype: jnp.dtype) -> contextlib.AbstractContextManager[Any]:
    """Within it, products of float32 are of float32. A GPU would otherwise round their factors to TF32."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()


def close_step(
    model: Decoder,
    batch: FlatBatch,
    x: Float[Array, "1 R D"],
    every: Routed,
    last_tokens: Int[Array, " places"],
    config: ModelConfig,
) -> StepOutputs:
    """From the last layer's output to logits, the most probable tokens and the report. Part of a jitted function.

    `every` is of all MoE layers.
    """
    logits = model.logits(batch.last_hidden(x))
    rows = batch.of_sequences()
    # A key, value or router logit that is NaN makes its token's residual stream NaN, which stays so to the end.
    lost = jnp.any(rows & ~jnp.all(jnp.isfinite(x[0]), axis=-1)[None, :], axis=-1)
    tokens = most_probable(logits)

    def by_sequence(of_layers: Shaped[Array, "M R"]) -> Shaped[Array, " B"]:
        return jnp.sum(jnp.where(rows, jnp.sum(of_layers, axis=0)[None, :], 0), axis=-1)

    outcome = Report(
        tokens=tokens,
        substituted_choices=by_sequence(every.substituted_choices),
        substituted_weight=by_sequence(every.substituted_weight),
        wish_counts=every.wish_counts,
        needed=every.needed,
        ranked=every.ranked,
        finite=~lost & jnp.all(jnp.isfinite(logits), axis=-1),
    )
    report = Report.packing(batch.shape, config).pack(outcome._asdict())
    last_tokens = last_tokens.at[batch.inputs.token_places].set(tokens, mode="drop")
    return StepOutputs(x, logits, report, every.probs, last_tokens)


@partial(jax.jit, donate_argnames=("tables",))
def write_pages(
    tables: Int[Array, "tables pages_per_sequence"], new: Int32[Array | np.ndarray, " n"]
) -> Int[Array, "tables pages_per_sequence"]:
    """Block tables with packed `NewPages`. Donates `tables`."""
    room = new.shape[0] // len(NewPages._fields)
    rows, columns, pages = NewPages(**NewPages.packing(room).unpack(jnp.asarray(new)))
    rows = jnp.where(rows < 0, tables.shape[0], rows)
    return tables.at[rows, columns].set(pages, mode="drop")


@partial(jax.jit, static_argnames=("shape",), donate_argnames=("tables",))
def with_tables(
    words: Words,
    rows: Int32[Array | np.ndarray, " B"],
    lengths: Int32[Array | np.ndarray, " B"],
    new: Int32[Array | np.ndarray, " n"],
    tables: Int[Array, "tables pages_per_sequence"],
    *,
    shape: Shape,
) -> tuple[Int32[Array, " all_words"], Int[Array, "tables pages_per_sequence"]]:
    """A whole `StepInputs` from one without block tables, and the tables with packed `NewPages`. Donates `tables`."""
    tables = write_pages(tables, new)
    is_known = jnp.arange(shape.pages, dtype=jnp.int32)[None, :] < jnp.asarray(lengths)[:, None]
    found = jnp.where(is_known, tables[jnp.asarray(rows)], TRASH_PAGE)
    return jnp.concatenate([jnp.asarray(words), found.reshape(-1)]), tables


@partial(jax.jit, static_argnames=("skeleton", "config", "shape", "platform"), donate_argnames=("cache",))
def whole_step(
    leaves: tuple[Array, ...],
    experts: tuple[ExpertWeights, ...],
    slots: Int[Array, "M E"],
    cache: KVCache,
    inputs: Words,
    last_tokens: Int[Array, " places"],
    *,
    skeleton: Skeleton,
    config: ModelConfig,
    shape: Shape,
    platform: str | None = None,
) -> tuple[KVCache, StepOutputs]:
    """A forward in one call, in which routers do without absent experts as far as each row allows. Donates `cache`.

    Where the report says that an absent expert was needed, everything from that layer's experts on is void.
    """
    model: Decoder = skeleton.join(leaves)
    batch = FlatBatch.unpack(inputs, shape)
    rotation, valid = Rotation.of(batch.positions[None], config), batch.valid
    views, places = batch.views(), batch.new_places()
    x = model.embed(batch.tokens(last_tokens))
    new_cache: list[LayerKV] = []
    routed: list[Routed] = []
    stopped: list[Stopped] = []
    may_miss = any(each.capacity < config.num_experts for each in experts)
    allowances = batch.allowances()
    with full_precision(x.dtype), tracing_for(platform):
        for index, layer in enumerate(model.layers):
            q, k, v = units.call(units.project, layer, x, rotation)
            pages = write(cache[index], k[0], v[0], places)
            new_cache.append(pages)
            attention = (layer, x, q, pages, views)
            statics = {"config": config, "window": config.sliding_window(index), "platform": default_platform()}
            if not config.is_moe(index):
                x = units.call(units.dense, *attention, **statics)
                continue
            m = len(stopped)
            x, at, of_layer = units.call(units.moe, *attention, slots[m], experts[m], valid, allowances, **statics)
            allowances = allowances._replace(budget=at.budget)
            stopped.append(at)
            routed.append(of_layer)
        every: Routed = jax.tree.map(lambda *layers: jnp.stack(layers), *routed)
        outputs = close_step(model, batch, x, every, last_tokens, config)
    if may_miss and keeps_stops(shape):
        outputs = outputs._replace(stops=Stops(stacked(stopped), every))
    return tuple(new_cache), outputs


@partial(jax.jit, static_argnames=("skeleton", "platform"))
def prompt_logprobs(
    leaves: tuple[Array, ...],
    x: Float[Array, "n D"],
    targets: Int[Array | np.ndarray, " n"],
    *,
    skeleton: Skeleton,
    platform: str | None = None,
) -> TokenLogprobs:
    """Log probabilities of `targets`, the tokens that follow those whose hidden states these are."""
    with full_precision(x.dtype), tracing_for(platform):
        return token_logprobs(skeleton.join(leaves).logits(x), jnp.asarray(targets))


@jax.jit
def take_rows(table: Float[Array, "... n"], rows: Int32[Array | np.ndarray, " R"]) -> Float[Array, "R n"]:
    """Some rows of logits, or of hidden states."""
    return table.reshape(-1, table.shape[-1])[rows]


class Comparison(NamedTuple):
    """Of logits with those of the same rows under all experts."""

    kl: Float[Array, " n"]
    """KL(all experts || others), in nats."""
    agrees: Bool[Array, " n"]
    """Whether both have the same most probable token."""


@partial(jax.jit, static_argnames=("skeleton", "platform"))
def compare_logits(
    leaves: tuple[Array, ...],
    x: Float[Array, "n D"],
    served: Float[Array | np.ndarray, "n V"],
    *,
    skeleton: Skeleton,
    platform: str | None = None,
) -> Comparison:
    """Compare `served` with the logits of these hidden states, which all experts computed."""
    model: Decoder = skeleton.join(leaves)
    with full_precision(x.dtype), tracing_for(platform):
        ours = jax.nn.log_softmax(model.logits(x), axis=-1)
    theirs = jax.nn.log_softmax(jnp.asarray(served), axis=-1)
    kl = jnp.sum(jnp.where(ours > -jnp.inf, jnp.exp(ours) * (ours - theirs), 0.0), axis=-1)
    return Comparison(kl, jnp.argmax(ours, axis=-1) == jnp.argmax(theirs, axis=-1))


@jax.jit
def add_embeddings(
    total: Float[Array, " D"],
    table: Float[Array, "V D"],
    tokens: Int32[Array | np.ndarray, " n"],
    count: Int32[Array | np.ndarray, ""],
    length: Float[Array | np.ndarray, ""],
) -> Float[Array, " D"]:
    """`total` plus the embeddings of the first `count` of these tokens over `length`, in float32."""
    rows = table[tokens].astype(jnp.float32)
    counted = jnp.arange(rows.shape[0], dtype=jnp.int32) < count
    return total + jnp.sum(jnp.where(counted[:, None], rows, 0), axis=0) / length


@partial(jax.jit, static_argnames=("room",))
def edit_logits(logits: Float[Array, "B V"], edits: Words, *, room: int) -> Float[Array, "B V"]:
    """Logits with the penalties and biases of `room` packed `TokenEdits`."""
    packing = TokenEdits.packing(logits.shape[0], room)
    return TokenEdits(**packing.unpack(jnp.asarray(edits))).apply(logits)


@jax.jit
def mask_logits(logits: Float[Array, "B V"], allowed: UInt32[Array | np.ndarray, "B W"]) -> Float[Array, "B V"]:
    """Logits in which only allowed tokens are possible."""
    return only_allowed(logits, jnp.asarray(allowed))


@partial(jax.jit, static_argnames=("by",))
def filter_logits(logits: Float[Array, "B V"], sampling: Words, *, by: str) -> Float[Array, "B V"]:
    """What one of the `FILTERS` leaves of logits, for rows with packed `SamplingArrays`."""
    return FILTERS[by](logits, _sampling(sampling, logits))


@partial(jax.jit, static_argnames=("random",))
def choose_tokens(
    logits: Float[Array, "B V"],
    sampling: Words,
    token_places: Int32[Array | np.ndarray, " B"],
    last_tokens: Int[Array, " places"],
    *,
    random: bool,
) -> tuple[Int32[Array, " B"], Int[Array, " places"]]:
    """The next tokens, and `last_tokens` with them at their places; the number of places is no place.

    Unless `random`, each row takes the most probable token.
    """
    tokens = sample(logits, _sampling(sampling, logits)) if random else most_probable(logits)
    return tokens, last_tokens.at[token_places].set(tokens, mode="drop")


def _sampling(words: Words, logits: Float[Array, "B V"]) -> SamplingArrays:
    return SamplingArrays(**SamplingArrays.packing(logits.shape[0]).unpack(jnp.asarray(words)))


@jax.jit
def chosen_logprobs(logits: Float[Array, "B V"], tokens: Int32[Array, " B"]) -> TokenLogprobs:
    """Of the tokens that were chosen, and of the best alternatives, from the logits before they were adjusted."""
    return token_logprobs(logits, tokens)
