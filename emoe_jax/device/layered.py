"""The forward that stops at every router: for steps that miss experts often, and the one without a KV cache."""

import itertools
from collections.abc import Sequence as Rows
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from emoe_jax.attention import LayerKV
from emoe_jax.device import layer_steps as step
from emoe_jax.device.batch import Batch, uncached_batches
from emoe_jax.device.executables import Executables
from emoe_jax.device.step import Skeleton, StepOutputs
from emoe_jax.device.stops import Routed, Stopped, Stops
from emoe_jax.errors import RequestError
from emoe_jax.models.decoder import Decoder
from emoe_jax.requests.contract import Allowance
from emoe_jax.residency.residency import Residency


class LayeredForward:
    """Computes a batch layer by layer, so that the experts that a router wishes for can be loaded before they are used.

    Layers of one kind share an executable. `leaves` are the model's arrays on the device.
    """

    def __init__(self, model: Decoder, leaves: Any, residency: Residency, executables: Executables):
        self.config = model.config
        self._residency = residency
        self._executables = executables
        self._skeleton, _ = Skeleton.split(model)
        self._leaves = leaves
        sharding = residency.slab.sharding
        layers = [Skeleton.split(layer) for layer in model.layers]
        self._layers = [(skeleton, jax.device_put(leaves, sharding)) for skeleton, leaves in layers]
        kinds = [(skeleton, self.config.sliding_window(index)) for index, (skeleton, _) in enumerate(layers)]
        self._kinds = [kinds.index(kind) for kind in kinds]  # the number of the first layer of a kind stands for it
        self._before_first = like_before_first(self.config.moe_layers, self._kinds)

    def logits(
        self, token_ids: Rows[int], allowance: Allowance, like: LayerKV, last_tokens: Int[Array, " places"]
    ) -> Float[np.ndarray, "T V"]:
        """Float32 logits of one forward without a KV cache, as `Runner.logits` describes it.

        `like` has pages of the shape and dtype that a layer's keys and values get; nothing in it is read.
        """
        length = len(token_ids)
        if not 0 < length <= self.config.max_position:
            raise RequestError(f"{length} tokens given; expected 1 to {self.config.max_position}", param="token_ids")
        batches = uncached_batches(token_ids, allowance)
        alone = len(batches) == 1  # then nothing is attended to but the batch itself
        states: list[Any] = []
        budgets: list[Float[Array, " R"]] = []
        for batch in batches:
            x, budget = self._embedded(batch, batch.words, last_tokens)
            states.append(x if alone else np.asarray(x))  # the device holds one batch at a time
            budgets.append(budget)
        pages = None if alone else self._blank_pages(batches[0].shape.pages + 1, like)
        for index in range(len(self._layers)):
            for number, batch in enumerate(batches):
                x = jax.device_put(states[number], self._residency.slab.sharding)
                pages, x, budgets[number] = self._layer(index, batch, batch.words, x, budgets[number], pages)
                states[number] = x if alone else np.asarray(x)
        logits = np.empty((length, self.config.vocab_size), np.float32)
        for batch, x in zip(batches, states, strict=True):
            x = jax.device_put(x, self._residency.slab.sharding)
            rows = self._executables.call(step.all_logits, batch.shape.rows, self._leaves, x, skeleton=self._skeleton)
            start, count = batch.inputs.starts[0], batch.inputs.lengths[0]
            logits[start : start + count] = np.asarray(rows)[:count]
        return logits

    def run(
        self, batch: Batch, words: Int32[Array, " words"], cache: list[LayerKV], last_tokens: Int[Array, " places"]
    ) -> StepOutputs:
        """One batch of a step, whose `words` are on the device. Donates the arrays of `cache`, and puts the new ones in
        their place as it goes.

        Raises what the expert store raises; `cache` stays usable.
        """
        statics = {"skeleton": self._skeleton, "config": self.config, "shape": batch.shape}
        stopped, total, every = self._executables.call(
            step.start_layers, batch.shape, self._leaves, words, last_tokens, **statics
        )
        at, every = self._to_router(0, stopped, total, every, batch, words, cache)
        return self._go_on(0, at, every, batch, words, cache, last_tokens)

    def go_on(
        self,
        layer: int,
        stops: Stops,
        batch: Batch,
        words: Int32[Array, " words"],
        cache: list[LayerKV],
        last_tokens: Int[Array, " places"],
    ) -> StepOutputs:
        """As `run`, for a batch of which a whole forward stands up to the router of a MoE layer."""
        at = self._executables.call(step.stop_at, batch.shape, stops, np.int32(layer))
        return self._go_on(layer, at, stops.routed, batch, words, cache, last_tokens)

    def compile_waves(self, batch: Batch) -> None:
        """Compile what the experts of every layer need: layers of one capacity share an executable."""
        R, D, k = batch.shape.rows, self.config.hidden_size, self.config.top_k
        sharding, dtype = self._residency.slab.sharding, self._leaves[0].dtype

        def blank(shape: tuple[int, ...], dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        rows, ids, weights = blank((R, D), dtype), blank((R, k), np.int32), blank((R, k), np.float32)
        stopped = Stopped(blank((1, R, D), dtype), rows, ids, weights, blank((R,), np.float32))
        for experts in self._residency.slab.weights:
            arguments = (stopped, np.zeros(self.config.num_experts, np.int32), experts, rows)
            self._executables.compile(step.expert_wave, (R, experts.capacity), *arguments, config=self.config)

    def experts(
        self, m: int, at: step.StoppedAt, batch: Batch, words: Int32[Array | np.ndarray, " words"]
    ) -> Float[Array, "R D"]:
        """What the experts of a MoE layer contribute, wave by wave as they are there."""
        stopped, used, total = at
        ahead = self._residency.waves.ahead if batch.may_need and m + 1 < len(self.config.moe_layers) else None
        guess = None if ahead is None else self._next_wishes(m, stopped, batch, words)
        for slots in self._residency.waves.waves(m, np.asarray(used)):
            if ahead is not None:
                # This layer's first wave is there: the link is free for the next layer while this one computes.
                ahead.expect(m + 1, np.asarray(guess))
                ahead = None
            experts = self._residency.slab.weights[m]
            key = (batch.shape.rows, experts.capacity)
            total = self._executables.call(step.expert_wave, key, stopped, slots, experts, total, config=self.config)
        return total

    def _go_on(
        self,
        m: int,
        at: step.StoppedAt,
        every: Routed,
        batch: Batch,
        words: Int32[Array, " words"],
        cache: list[LayerKV],
        last_tokens: Int[Array, " places"],
    ) -> StepOutputs:
        """From the router of MoE layer `m` to the end."""
        config, shape = self.config, batch.shape
        layers = config.moe_layers
        for number in range(m, len(layers) - 1):
            total = self.experts(number, at, batch, words)
            at, every = self._to_router(number + 1, at[0], total, every, batch, words, cache)
        total = self.experts(len(layers) - 1, at, batch, words)
        behind = slice(layers[-1] + 1, len(cache))
        arguments = (self._leaves, at[0], total, tuple(cache[behind]), words)
        statics = {"skeleton": self._skeleton, "config": config, "shape": shape}
        key = (shape, _pages(cache[behind]))
        cache[behind], outputs = self._executables.call(step.end_layers, key, *arguments, every, last_tokens, **statics)
        return outputs

    def _to_router(
        self,
        m: int,
        stopped: Stopped,
        total: Float[Array, "R D"],
        every: Routed,
        batch: Batch,
        words: Int32[Array, " words"],
        cache: list[LayerKV],
    ) -> tuple[step.StoppedAt, Routed]:
        """From what the experts of the MoE layer before `m` add up to, to the router of `m`."""
        config, shape = self.config, batch.shape
        before, last = self._before_first if m == 0 else config.moe_layers[m - 1], config.moe_layers[m]
        behind = range(0 if m == 0 else before + 1, last + 1)
        parts = [self._layers[index] for index in (before, *behind)]
        pages = tuple(cache[behind.start : behind.stop])
        key = (tuple(self._kinds[index] for index in (before, *behind)), shape, _pages(pages))
        arguments = (tuple(leaves for _, leaves in parts), stopped, total, pages, words)
        cache[behind.start : behind.stop], at, every = self._executables.call(
            step.go_on,
            key,
            *arguments,
            self._residency.table.resident_mask[m],
            every,
            np.int32(m),
            skeletons=tuple(skeleton for skeleton, _ in parts),
            config=config,
            windows=tuple(map(config.sliding_window, behind)),
            shape=shape,
        )
        return at, every

    def _embedded(
        self, batch: Batch, words: Int32[Array | np.ndarray, " words"], last_tokens: Int[Array, " places"]
    ) -> tuple[Float[Array, "1 R D"], Float[Array, " R"]]:
        statics = {"skeleton": self._skeleton, "shape": batch.shape}
        return self._executables.call(step.embed, batch.shape, self._leaves, words, last_tokens, **statics)

    def _layer(
        self,
        index: int,
        batch: Batch,
        words: Int32[Array | np.ndarray, " words"],
        x: Float[Array, "1 R D"],
        budget: Float[Array, " R"],
        layer_cache: LayerKV | None,
    ) -> tuple[LayerKV | None, Float[Array, "1 R D"], Float[Array, " R"]]:
        """One layer of an uncached forward. Donates `layer_cache`; without one, the sequence attends to itself only.

        Returns the cache, the hidden states and what is left of the budget.
        """
        config, shape = self.config, batch.shape
        skeleton, leaves = self._layers[index]
        kind, window = self._kinds[index], config.sliding_window(index)
        key = (kind, shape, 0 if layer_cache is None else layer_cache.k.shape[0])
        statics = {"skeleton": skeleton, "config": config, "window": window, "shape": shape}
        if not config.is_moe(index):
            layer_cache, x = self._executables.call(step.dense_layer, key, leaves, x, layer_cache, words, **statics)
            return layer_cache, x, budget
        m = config.moe_layers.index(index)
        arguments = (leaves, x, layer_cache, words, self._residency.table.resident_mask[m], budget)
        layer_cache, at = self._executables.call(step.attend_and_route, key, *arguments, **statics)
        stopped, total = at[0], self.experts(m, at, batch, words)
        x = self._executables.call(step.close_moe, (kind, shape.rows), leaves, stopped, total, skeleton=skeleton)
        return layer_cache, x, stopped.budget

    def _next_wishes(
        self, m: int, stopped: Stopped, batch: Batch, words: Int32[Array | np.ndarray, " words"]
    ) -> Int[Array, " E"]:
        """What the router of the next MoE layer makes of this one's input, still on the device."""
        index = self.config.moe_layers[m + 1]
        skeleton, leaves = self._layers[index]
        statics = {"skeleton": skeleton, "config": self.config, "shape": batch.shape}
        key = (self._kinds[index], batch.shape)
        return self._executables.call(step.next_wishes, key, leaves, stopped.x, words, **statics)

    def _blank_pages(self, count: int, like: LayerKV) -> LayerKV:
        """Pages of one layer for an uncached forward."""
        sharding = self._residency.slab.sharding

        def blank(pages: Array) -> Array:
            return jax.device_put(np.zeros((count, *pages.shape[1:]), pages.dtype), sharding)

        return jax.tree.map(blank, like)


def like_before_first(moe_layers: Rows[int], kinds: Rows[int]) -> int:
    """A layer with experts that can stand before the first one, where nothing does.

    If possible one behind which such layers come as begin the model: then what leads from there to the next router also
    leads to the first.

    Worked example, kinds of four layers with experts [0, 1, 0, 1]: layer 1.
    """
    first = list(kinds[: moe_layers[0] + 1])
    pairs = itertools.pairwise(moe_layers)
    like = (before for before, last in pairs if list(kinds[before + 1 : last + 1]) == first)
    return next(like, moe_layers[0])


def _pages(cache: Rows[LayerKV]) -> tuple[int, ...]:
    """How many pages each of these layers has: a part of what shapes a call."""
    return tuple(layer.k.shape[0] for layer in cache)
