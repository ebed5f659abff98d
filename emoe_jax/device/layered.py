"""The forward that stops at every router: the `exact` contract's, and the one without a KV cache."""

import functools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from emoe_jax.attention.paged import LayerKV
from emoe_jax.device import step
from emoe_jax.device.batch import Batch, uncached_batches
from emoe_jax.device.executables import Executables
from emoe_jax.errors import RequestError
from emoe_jax.models.decoder import Decoder
from emoe_jax.models.routing import Substituted
from emoe_jax.requests.request import RoutingContract
from emoe_jax.residency.residency import Residency


class LayeredForward:
    """Computes a batch layer by layer, so that the experts that a router wishes for can be loaded before they are used.

    Layers of one kind share an executable. `leaves` are the model's arrays on the device.
    """

    def __init__(self, model: Decoder, leaves: Any, residency: Residency, executables: Executables):
        self.config = model.config
        self._residency = residency
        self._executables = executables
        self._skeleton, _ = step.Skeleton.split(model)
        self._leaves = leaves
        sharding = residency.slab.sharding
        layers = [step.Skeleton.split(layer) for layer in model.layers]
        self._layers = [(skeleton, jax.device_put(leaves, sharding)) for skeleton, leaves in layers]
        kinds = [(skeleton, self.config.sliding_window(index)) for index, (skeleton, _) in enumerate(layers)]
        self._kinds = [kinds.index(kind) for kind in kinds]  # the number of the first layer of a kind stands for it

    def logits(
        self, token_ids: Rows[int], routing: RoutingContract, like: LayerKV, last_tokens: Int[Array, " places"]
    ) -> Float[np.ndarray, "T V"]:
        """Float32 logits of one forward without a KV cache, as `Runner.logits` describes it.

        `like` has pages of the shape and dtype that a layer's keys and values get; nothing in it is read.
        """
        length = len(token_ids)
        if not 0 < length <= self.config.max_position:
            raise RequestError(f"{length} tokens given; expected 1 to {self.config.max_position}", param="token_ids")
        batches = uncached_batches(token_ids, routing)
        alone = len(batches) == 1  # then nothing is attended to but the batch itself
        states: list[Any] = []
        for batch in batches:
            tokens, shape = batch.inputs.tokens, batch.shape[:2]
            x = self._executables.call(step.embed, shape, self._leaves, tokens, last_tokens, skeleton=self._skeleton)
            states.append(x if alone else np.asarray(x))  # the device holds one batch at a time
        pages = None if alone else self._blank_pages(batches[0].shape.pages + 1, like)
        for index in range(len(self._layers)):
            for number, batch in enumerate(batches):
                x = jax.device_put(states[number], self._residency.slab.sharding)
                pages, x, *_ = self._layer(index, batch, x, pages)
                states[number] = x if alone else np.asarray(x)
        logits = np.empty((length, self.config.vocab_size), np.float32)
        for batch, x in zip(batches, states, strict=True):
            x = jax.device_put(x, self._residency.slab.sharding)
            rows = self._executables.call(step.all_logits, batch.shape[:2], self._leaves, x, skeleton=self._skeleton)
            start, count = batch.inputs.starts[0], batch.inputs.lengths[0]
            logits[start : start + count] = np.asarray(rows)[0, :count]
        return logits

    def run(self, batch: Batch, cache: list[LayerKV], last_tokens: Int[Array, " places"]) -> step.StepOutputs:
        """One batch of a step. Donates the arrays of `cache`, and puts the new ones in their place as it goes.

        `last_tokens` are the tokens of the steps before. Raises what the expert store raises; `cache` stays usable.
        """
        x, wish_counts, wishes = self._hidden(batch, cache, last_tokens)
        logits, finite = self._executables.call(
            step.last_logits, batch.shape[:2], self._leaves, x, batch.inputs.lengths, skeleton=self._skeleton
        )
        nothing = Substituted(*np.zeros((2, batch.shape.sequences)))  # pyright: ignore[reportArgumentType]
        return step.StepOutputs(x, logits, np.stack(wish_counts), nothing, finite, wishes)

    def _hidden(
        self, batch: Batch, cache: list[LayerKV], last_tokens: Int[Array, " places"]
    ) -> tuple[Float[Array, "B T D"], list[Int[np.ndarray, " E"]], list[step.Wishes]]:
        """The last hidden states, the wish counts and (still on the device) the wishes per MoE layer."""
        x = self._executables.call(
            step.embed, batch.shape[:2], self._leaves, batch.inputs.tokens, last_tokens, skeleton=self._skeleton
        )
        wish_counts: list[np.ndarray] = []
        wishes: list[step.Wishes] = []
        for index in range(len(self._layers)):
            keep = functools.partial(cache.__setitem__, index)
            _, x, counts, layer_wishes = self._layer(index, batch, x, cache[index], keep)
            if layer_wishes is not None:
                wish_counts.append(counts)
                wishes.append(layer_wishes)
        return x, wish_counts, wishes

    def _layer(
        self,
        index: int,
        batch: Batch,
        x: Float[Array, "B T D"],
        layer_cache: LayerKV | None,
        keep: Callable[[LayerKV], None] | None = None,
    ) -> tuple[LayerKV | None, Float[Array, "B T D"], Int[np.ndarray, " E"], step.Wishes | None]:
        """One layer that stops at its router. Donates `layer_cache`; without one, sequences attend to themselves only.

        Returns the cache, the hidden states, the wish counts and the wishes (None of a layer without experts). `keep`
        gets the cache before anything can fail: the old arrays are gone by then.
        """
        config, shape, inputs = self.config, batch.shape, batch.inputs
        skeleton, leaves = self._layers[index]
        kind, window = self._kinds[index], config.sliding_window(index)
        pages = 0 if layer_cache is None else layer_cache.k.shape[0]
        statics = {"skeleton": skeleton, "config": config, "window": window}
        if not config.is_moe(index):
            layer_cache, x = self._executables.call(
                step.dense_layer, (kind, *shape, pages), leaves, x, layer_cache, inputs, **statics
            )
            if keep is not None and layer_cache is not None:
                keep(layer_cache)
            return layer_cache, x, np.zeros(0, np.int32), None
        m = config.moe_layers.index(index)
        restricted = batch.routing == "resident"
        layer_cache, routed, total, wishes = self._executables.call(
            step.attend_and_route,
            (kind, *shape, pages, restricted),
            leaves,
            x,
            layer_cache,
            inputs,
            self._residency.table.resident_mask[m],
            restricted=restricted,
            **statics,
        )
        if keep is not None and layer_cache is not None:
            keep(layer_cache)
        ahead = None if restricted or m + 1 == len(config.moe_layers) else self._residency.waves.ahead
        guess = None if ahead is None else self._next_wishes(m, routed, batch)
        counts = np.asarray(routed.wish_counts)
        for slots in self._waves(m, counts, batch.routing):
            if ahead is not None:
                # This layer's first wave is there: the link is free for the next layer while this one computes.
                ahead.expect(m + 1, np.asarray(guess))
                ahead = None
            experts = self._residency.slab.weights[m]
            wave = (*shape[:2], experts.capacity)
            total = self._executables.call(step.expert_wave, wave, routed, slots, experts, total, config=config)
        x = self._executables.call(step.close_moe, (kind, *shape[:2]), leaves, routed, total, skeleton=skeleton)
        return layer_cache, x, counts, wishes

    def _next_wishes(self, m: int, routed: step.Routed, batch: Batch) -> Int[Array, " E"]:
        """What the router of the next MoE layer makes of this one's input, still on the device."""
        index = self.config.moe_layers[m + 1]
        skeleton, leaves = self._layers[index]
        key = (self._kinds[index], *batch.shape[:2])
        lengths = batch.inputs.lengths
        return self._executables.call(
            step.next_wishes, key, leaves, routed.x, lengths, skeleton=skeleton, config=self.config
        )

    def _waves(
        self, m: int, wish_counts: Int[np.ndarray, " E"], routing: RoutingContract
    ) -> Iterator[Int[np.ndarray, " E"]]:
        """Slots of the experts that take part, per call of the MoE op: the resident ones, or the wished in waves."""
        if routing == "resident":
            yield self._residency.table.slot_of_expert[m].copy()
        else:
            yield from self._residency.waves.waves(m, wish_counts)

    def _blank_pages(self, count: int, like: LayerKV) -> LayerKV:
        """Pages of one layer for an uncached forward."""
        shape, dtype = (count, *like.k.shape[1:]), like.k.dtype
        zeros = np.zeros(shape, dtype)
        sharding = self._residency.slab.sharding
        return LayerKV(jax.device_put(zeros, sharding), jax.device_put(zeros.copy(), sharding))
