"""Runs step plans on the device: picks executables, keeps the donated cache, reads the tokens back."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.device import step
from emoe_jax.device.batch import Batch, Buckets, Shape, batches_of, empty_batch
from emoe_jax.device.compiling import MemoryShapes, compile_adjusted_choice
from emoe_jax.device.executables import Executables
from emoe_jax.device.kv_cache import KVCache, move_pages, resize_pages
from emoe_jax.device.layered import LayeredForward
from emoe_jax.device.readback import keep_prompt_logprobs, not_finite, sampled_token
from emoe_jax.device.recording import counts_by_sequence, record_wishes, without_probs
from emoe_jax.device.sampler import TokenLogprobs
from emoe_jax.models.decoder import Decoder
from emoe_jax.policies.policy import ChunkWishes
from emoe_jax.progress import Progress
from emoe_jax.requests.request import RoutingContract
from emoe_jax.requests.sequence import Sequence
from emoe_jax.residency.residency import Residency, StepWishes
from emoe_jax.scheduling.plan import SampledToken, StepPlan, StepResult
from emoe_jax.traces.recorder import TraceRecorder

PAGES_MOVED = 32
"""KV pages that are copied in one call."""


class Dispatched(NamedTuple):
    """A plan that the device is computing."""

    plan: StepPlan
    batches: list[Batch]
    outputs: list[tuple[Any, ...]]
    residents: list[Bool[np.ndarray, "M E"]]
    """The experts that were there when each batch was dispatched, before an `exact` one loaded what it missed."""


@dataclasses.dataclass(frozen=True)
class RunResult(StepResult):
    """A step's tokens, and how often its routers wished for each expert."""

    wishes: StepWishes


class Runner:
    """Owns the weights and the KV cache on the device; the experts belong to `residency`.

    All calls of a plan are dispatched before the first result is read, so a `resident` step waits for the device once.
    The next plan may be dispatched before that: it finds the tokens that it feeds on the device.
    """

    def __init__(
        self,
        model: Decoder,
        residency: Residency,
        cache: KVCache,
        buckets: Buckets,
        executables: Executables | None = None,
    ):
        """`executables` are those compiled before."""
        self.config: ModelConfig = model.config
        self.buckets = buckets
        self.executables = executables or Executables()
        self.recorder: TraceRecorder | None = None
        self._places: dict[Sequence, int] = {}  # of the tokens that the newest plan samples, in `_last_tokens`
        self._embedding_table: np.ndarray | None = None
        self._residency = residency
        sharding = residency.slab.sharding
        self._cache = list(jax.device_put(cache, sharding))
        self._shapes = self._memory_shapes()
        self._last_tokens = jax.device_put(np.zeros(buckets.sequences[-1], np.int32), sharding)
        self._skeleton, leaves = step.Skeleton.split(model)
        self._leaves = jax.device_put(leaves, sharding)
        self._layered = LayeredForward(model, self._leaves, residency, self.executables)

    def dispatch(self, plan: StepPlan) -> Dispatched:
        """Start computing a plan, whose sequences may wait for tokens of the plan before.

        Raises what the expert store raises under the `exact` contract; the cache stays usable.
        """
        batches = batches_of(plan, self.buckets)
        places, last_tokens = self._places, self._last_tokens
        self._places = {}
        for batch in batches:
            batch.await_tokens(places)
        outputs, residents = [], []
        for batch in batches:
            residents.append(self._residency.table.resident_mask)
            outputs.append(self._run_batch(batch, last_tokens))
        return Dispatched(plan, batches, outputs, residents)

    def waits_within(self, plan: StepPlan) -> bool:
        """Whether `dispatch` waits for the device: where routers say which experts are to be loaded."""
        return not self._residency.is_full and any(sequence.routing == "exact" for sequence in plan.sequences)

    def wait(self, dispatched: Dispatched) -> None:
        """Wait until the device is done with a plan. What went wrong is raised by `collect`."""
        _is_readable(dispatched.outputs)

    def collect(self, dispatched: Dispatched) -> RunResult:
        """Wait for a plan's tokens, and count the expert assignments of each sequence that has not ended meanwhile."""
        batches, outputs = dispatched.batches, dispatched.outputs
        if self.recorder is None:
            outputs = [(*output, without_probs(wishes)) for *output, wishes in outputs]
        outputs = jax.device_get(outputs)
        sampled: dict[Sequence, SampledToken] = {}
        lost: set[Sequence] = set()
        choices = len(self.config.moe_layers) * self.config.top_k
        wish_counts = np.zeros((len(self.config.moe_layers), self.config.num_experts), np.int64)
        resident_counts = np.zeros_like(wish_counts)
        chunks: list[ChunkWishes] = []
        for batch, output, resident in zip(batches, outputs, dispatched.residents, strict=True):
            tokens, prompt_logprobs, counts, substituted, finite, wishes = output
            wish_counts += counts
            resident_counts += counts * resident
            spoilt = not_finite(batch, finite, prompt_logprobs)
            lost |= spoilt
            if self.recorder is not None:
                record_wishes(self.recorder, batch, wishes, spoilt)
            routed = counts_by_sequence(batch, wishes, self.config.num_experts)
            for row, piece in enumerate(batch.pieces):
                if piece.length > 1 and piece.sequence not in spoilt:
                    chunks.append(ChunkWishes(routed[row], piece.length))  # of an ended sequence too: `counts` has them
                if piece.sequence.finished or piece.sequence in spoilt:
                    continue
                piece.sequence.add_routing(routed[row])
                piece.sequence.substituted += int(substituted.choices[row])
                piece.sequence.substituted_weight += float(substituted.weight[row])
                piece.sequence.assigned += piece.length * choices
                if prompt_logprobs is not None:
                    keep_prompt_logprobs(piece, prompt_logprobs)
                if piece.samples:
                    sampled[piece.sequence] = sampled_token(piece.sequence, tokens, row)
        return RunResult(sampled, StepWishes(wish_counts, resident_counts, chunks), not_finite=frozenset(lost))

    def mend(self) -> bool:
        """After a failed step, with none in flight: replace device arrays that it has taken along.

        A call that fails may have deleted the KV cache that was donated to it, or return arrays that raise when they
        are read. Returns whether the KV cache is blank now, so that what its pages held must be computed again.
        """
        if not _is_readable(self._last_tokens):
            self._last_tokens = jax.device_put(
                np.zeros(self._last_tokens.shape, self._last_tokens.dtype), self._residency.slab.sharding
            )
        lost = [index for index, layer_cache in enumerate(self._cache) if not _is_readable(layer_cache)]
        for index in lost:
            shapes = self._cache[index]
            blank = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), shapes)
            self._cache[index] = jax.device_put(blank, self._residency.slab.sharding)
        return bool(lost)

    def move_pages(self, moves: Mapping[int, int]) -> None:
        """Copy what is in some pages to others, once the steps in flight have written it."""
        pairs = list(moves.items())
        for first in range(0, len(pairs), PAGES_MOVED):
            padded = np.zeros((PAGES_MOVED, 2), np.int32)
            padded[: len(pairs) - first] = pairs[first : first + PAGES_MOVED]
            for index, layer_cache in enumerate(self._cache):
                self._cache[index] = move_pages(layer_cache, padded[:, 0], padded[:, 1])

    def resize_pages(self, layer: int, num_pages: int) -> None:
        """Give a layer another number of pages, while no step is in flight; the first ones keep what is in them."""
        old = self._cache[layer]
        self._cache[layer] = jax.block_until_ready(resize_pages(old, num_pages=num_pages))
        for array in jax.tree.leaves(old):
            array.delete()

    def memory_changed(self) -> None:
        """Slab or KV cache have other shapes: find the executables of these from now on."""
        self._shapes = self._memory_shapes()

    def embedding_table(self) -> Float[np.ndarray, "V D"]:
        """The model's input embeddings on the host: a view on CPU, a copy elsewhere."""
        if self._embedding_table is None:
            self._embedding_table = np.asarray(self._skeleton.join(self._leaves).embedding[...])
        return self._embedding_table

    def logits(self, token_ids: Rows[int], routing: RoutingContract) -> Float[np.ndarray, "T V"]:
        """Float32 logits of one uncached forward under a routing contract; NaN where the model computes NaN.

        Layer by layer, and within a layer at most `UNCACHED_ROWS` tokens at a time. Beside what a step of so many
        tokens takes, the device holds the keys and values of one layer; scores exist for one block of keys.
        """
        return self._layered.logits(token_ids, routing, self._cache[0], self._last_tokens)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compile every shape that `run` can meet: whole forwards on a pool of threads, the rest beside it."""
        shapes = self.buckets.shapes
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            forwards = [pool.submit(self._compile_resident, shape) for shape in shapes]
            V, sharding = self.config.vocab_size, self._residency.slab.sharding
            forwards += [
                pool.submit(compile_adjusted_choice, self.executables, self.buckets, B, V, sharding)
                for B in self.buckets.sequences
            ]
            forwards += [pool.submit(self._compile_prompt_logprobs, T) for T in sorted({1, *self.buckets.chunk_tokens})]
            total, done = len(shapes) + len(forwards), 0
            for shape in shapes:
                if not self._residency.is_full:
                    jax.block_until_ready(self._run_batch(empty_batch(shape, "exact"), self._last_tokens))
                done += 1
                if progress is not None:
                    progress(done, total)
            for forward in forwards:
                forward.result()
                done += 1
                if progress is not None:
                    progress(done, total)
        for shape in shapes:
            jax.block_until_ready(self._run_batch(empty_batch(shape, "resident"), self._last_tokens))
        self.move_pages({0: 0})

    def _run_batch(self, batch: Batch, last_tokens: Int[Array, " places"]) -> tuple[Any, ...]:
        """Dispatch one batch: its tokens, log probabilities of prompts, wish counts, substituted choices, which of its
        sequences are finite, and wishes, still on the device.

        `last_tokens` are those of the steps before. Tokens of earlier batches of the same step are not among them.
        """
        if batch.routing == "exact" and not self._residency.is_full:
            outputs = self._layered.run(batch, self._cache, last_tokens)
        else:
            arguments = self._resident_arguments(batch, last_tokens)
            cache, outputs = self.executables.call(
                step.resident_step, (batch.shape, self._shapes), *arguments, **self._statics
            )
            self._cache = list(cache)
        adjusted = batch.sampling.adjustments is not None
        sampled, self._last_tokens = self.executables.call(
            step.choose_tokens,
            (batch.shape.sequences, adjusted),
            outputs.logits,
            batch.sampling,
            batch.want_logprobs,
            self._last_tokens,
            self._places_for(batch),
        )
        return (
            sampled,
            self._prompt_logprobs(batch, outputs.hidden),
            outputs.wish_counts,
            outputs.substituted,
            outputs.finite,
            outputs.wishes,
        )

    def _places_for(self, batch: Batch) -> Int[np.ndarray, " B"]:
        """Where the tokens that a batch samples are kept for the plan that follows."""
        places = np.full(batch.shape.sequences, self._last_tokens.shape[0], np.int32)
        for row, piece in enumerate(batch.pieces):
            if piece.samples:
                places[row] = self._places[piece.sequence] = len(self._places)
        return places

    def _resident_arguments(self, batch: Batch, last_tokens: Int[Array, " places"]) -> tuple[Any, ...]:
        residency = self._residency
        return (
            self._leaves,
            residency.slab.weights,
            residency.table.device_table(),
            tuple(self._cache),
            batch.inputs,
            last_tokens,
        )

    def _prompt_logprobs(self, batch: Batch, hidden: Float[Array, "B T D"]) -> TokenLogprobs | None:
        """Log probabilities of the prompt's tokens that follow those of a chunk, for a sequence that asks for them."""
        targets = batch.prompt_targets()
        if targets is None:
            return None
        return self.executables.call(
            step.prompt_logprobs, batch.shape.tokens, self._leaves, hidden, targets, skeleton=self._skeleton
        )

    def _memory_shapes(self) -> MemoryShapes:
        return MemoryShapes(self._residency.slab.capacities, tuple(layer.k.shape[0] for layer in self._cache))

    @property
    def _statics(self) -> dict[str, Any]:
        return {"skeleton": self._skeleton, "config": self.config}

    def _compile_resident(self, shape: Shape) -> None:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
            self._resident_arguments(empty_batch(shape, "resident"), self._last_tokens),
        )
        self.executables.compile(step.resident_step, (shape, self._shapes), *shapes, **self._statics)

    def _compile_prompt_logprobs(self, T: int) -> None:
        targets = np.zeros(T, np.int32)
        embed = functools.partial(step.embed, skeleton=self._skeleton)
        hidden = jax.eval_shape(embed, self._leaves, targets[None], self._last_tokens)
        hidden = jax.ShapeDtypeStruct(hidden.shape, hidden.dtype, sharding=self._residency.slab.sharding)
        self.executables.compile(step.prompt_logprobs, T, self._leaves, hidden, targets, skeleton=self._skeleton)


def _is_readable(arrays: Any) -> bool:
    """Whether these device arrays exist and were computed without an error. Waits for them."""
    try:
        jax.block_until_ready(arrays)
    except RuntimeError:  # deleted, or the error of the call that should have computed them
        return False
    return True
