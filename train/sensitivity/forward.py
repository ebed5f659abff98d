"""A checkpoint with every expert resident, whose routers can be overruled: chosen layers use random experts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.attention import KVView, LayerKV, paged_attend
from emoe_jax.checkpoint import Checkpoint
from emoe_jax.config import ModelConfig
from emoe_jax.device.kv_cache import KVCache, new_cache
from emoe_jax.device.step import Skeleton
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.memory.plan import MemoryPlan, usable_memory
from emoe_jax.models import load_dense, open_checkpoint
from emoe_jax.models.decoder import Decoder
from emoe_jax.models.rope import Rotation
from emoe_jax.moe import moe_ffn
from emoe_jax.scheduling.pages import PAGE_SIZE, pages_for


class TextInputs(NamedTuple):
    """New tokens of sequences, padded to one length: `lengths` of each, the first at position `starts`."""

    tokens: Int[Any, "B T"]
    starts: Int[Any, " B"]
    lengths: Int[Any, " B"]
    block_tables: Int[Any, "B pages_per_sequence"]

    def view(self) -> KVView:
        """What the tokens attend to."""
        starts, lengths, tables = (jnp.asarray(x) for x in self[1:])
        return KVView.of(starts, lengths, tables, self.tokens.shape[1])


class RandomisedModel:
    """A whole model on the device. `seed` decides which experts take the place of a router's choice.

    In a layer whose routing is randomised, each token is served by `k` different experts drawn uniformly, weighted as
    the router weighted its own, best first. The draw follows from seed, layer, sequence and position alone, so that a
    token meets the same experts in every call and however many other layers are randomised.
    """

    def __init__(self, path: str | Path, seed: int, batch: int):
        """Raises what `Engine.load` raises where the model cannot be read or does not fit the device."""
        checkpoint = open_checkpoint(path)
        config = self.config = checkpoint.config
        self.directory = checkpoint.directory
        plan = MemoryPlan.of(
            config,
            platform=jax.devices()[0].platform,
            device_bytes=usable_memory(),
            expert_memory="100%",
            max_num_seqs=batch,
        )
        self.max_tokens = plan.max_model_len
        self._dtype, self._key = plan.dtype, jax.random.key(seed)
        self._skeleton, self._leaves = Skeleton.split(nnx.merge(*load_dense(checkpoint, plan.dtype)))
        self._experts = tuple(_experts(checkpoint, layer, plan.dtype) for layer in range(len(config.moe_layers)))

    def new_cache(self, sequences: int, tokens: int) -> tuple[KVCache, Int[np.ndarray, "B pages"]]:
        """An empty KV cache for so many sequences of up to `tokens` tokens, and its block tables."""
        pages = pages_for(tokens)
        tables = 1 + np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages)
        return new_cache(self.config, 1 + sequences * pages, self._dtype), tables

    def run(
        self,
        cache: KVCache,
        inputs: TextInputs,
        at: Int[np.ndarray, "B answer"],
        sequences: Int[np.ndarray, " B"],
        random_layers: Bool[np.ndarray, " M"],
    ) -> tuple[KVCache, Float[Array, "B answer V"]]:
        """Compute new tokens and return the logits of those `at` these places among them. Donates `cache`.

        `sequences` number the prompts for the random draw; `random_layers` says in which MoE layers it rules.
        """
        return _run(
            self._leaves,
            self._experts,
            cache,
            inputs,
            at,
            sequences,
            random_layers,
            self._key,
            skeleton=self._skeleton,
            config=self.config,
        )


def page_room(tokens: int) -> int:
    """`tokens` rounded up to whole pages of the KV cache."""
    return pages_for(tokens) * PAGE_SIZE


def _experts(checkpoint: Checkpoint, layer: int, dtype: str) -> ExpertWeights:
    """All experts of one MoE layer, in order."""
    record_format, number = RecordFormat.of(checkpoint.config, dtype), checkpoint.config.num_experts
    arrays = [np.empty((number, *array.shape), array.dtype) for array in record_format.arrays]
    record = np.empty(record_format.size, record_format.dtype)
    for expert in range(number):
        checkpoint.read_expert(layer, expert, record, record_format)
        for array, part in zip(arrays, record_format.views(record), strict=True):
            array[expert] = part
    return record_format.weights(arrays)


@partial(jax.jit, static_argnames=("skeleton", "config"), donate_argnames=("cache",))
def _run(
    leaves: tuple[Array, ...],
    experts: tuple[ExpertWeights, ...],
    cache: KVCache,
    inputs: TextInputs,
    at: Int[Array, "B answer"],
    sequences: Int[Array, " B"],
    random_layers: Bool[Array, " M"],
    key: Array,
    *,
    skeleton: Skeleton,
    config: ModelConfig,
) -> tuple[KVCache, Float[Array, "B answer V"]]:
    model: Decoder = skeleton.join(leaves)
    view = inputs.view()
    valid = view.valid.reshape(-1)
    everyone = jnp.arange(config.num_experts)
    x, rotation = model.embed(jnp.asarray(inputs.tokens)), Rotation.of(view.positions, config)
    new_layers: list[LayerKV] = []
    m = 0
    for index, layer in enumerate(model.layers):
        attend_fn = paged_attend(config, config.sliding_window(index), cache[index], view)
        x, layer_cache = layer.attention(x, rotation, attend_fn)
        new_layers.append(layer_cache)
        if not config.is_moe(index):
            x = layer.dense(x)
            continue
        rows, routing = layer.moe_input(x, None, valid)
        drawn = draw_experts(jax.random.fold_in(key, m), sequences, view.positions, config).reshape(routing.ids.shape)
        drawn = jnp.where(routing.ids < config.num_experts, drawn, config.num_experts)  # no assignment stays none
        ids = jnp.where(random_layers[m], drawn, routing.ids)
        x = layer.moe_output(x, rows, moe_ffn(rows, ids, routing.weights, everyone, experts[m], config))
        m += 1
    return tuple(new_layers), model.logits(jnp.take_along_axis(x, at[..., None], axis=1))


def draw_experts(
    key: Array, sequences: Int[Array, " B"], positions: Int[Array, "B T"], config: ModelConfig
) -> Int[Array, "B T k"]:
    """`k` different experts per token, uniformly: the places of the `k` largest of `E` random numbers."""

    def draw(sequence: Array, position: Array) -> Array:
        token = jax.random.fold_in(jax.random.fold_in(key, sequence), position)
        return jax.lax.top_k(jax.random.uniform(token, (config.num_experts,)), config.top_k)[1]

    return jax.vmap(jax.vmap(draw, (None, 0)))(sequences, positions)
