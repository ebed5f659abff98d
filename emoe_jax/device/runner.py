"""Computes batches on the device: picks executables, keeps weights, the donated KV cache and the newest tokens."""

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Rows
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from emoe_jax.config import ModelConfig
from emoe_jax.device import step
from emoe_jax.device.adjustments import Adjustments, adjustments_of
from emoe_jax.device.batch import Batch, empty_batch
from emoe_jax.device.block_tables import TableUpdate, blank_tables, tables_of
from emoe_jax.device.compiling import MemoryShapes, bytes_beside, compile_choices
from emoe_jax.device.executables import Executables
from emoe_jax.device.inputs import StepInputs
from emoe_jax.device.kv_cache import KVCache, in_calls, move_pages, resize_pages
from emoe_jax.device.layered import LayeredForward
from emoe_jax.device.sampler import Choice, SamplingArrays, TokenLogprobs
from emoe_jax.device.shapes import Buckets, Shape
from emoe_jax.device.stops import Stops
from emoe_jax.device.ways import Way
from emoe_jax.models.decoder import Decoder
from emoe_jax.progress import Progress
from emoe_jax.requests.contract import Allowance
from emoe_jax.residency.residency import Residency
from emoe_jax.traces.recorder import TraceRecorder

EMBEDDINGS_AT_ONCE = (64, 512, 4096)
"""Tokens of a prompt whose embeddings are added up in one call: the sizes that are compiled."""

FIRST_PIECES = 2
"""Of `Runner.warm_up_in_pieces`: a row that decodes, and a prompt."""


class Outputs(NamedTuple):
    """What a batch leaves on the device for the host."""

    report: Int32[Array, " words"]
    """A `Report`, packed."""
    tokens: Int32[Array, " B"] | None
    """None where those of the report were chosen."""
    logprobs: TokenLogprobs | None
    prompt_logprobs: tuple[TokenLogprobs, ...]
    """Of the rows of `Batch.prompt_targets`, `ROWS_TAKEN` at a time; the last ones are padding."""
    ranked_probs: Float[Array, "M R ranks"] | None
    """None where no recorder asks for them."""
    kept: tuple[Float[Array, "1 V"], ...]
    """The logits of the batch's `kept_places`."""
    comparison: step.Comparison | None
    """Of the rows of `audited_rows`; None where no text is audited."""


@dataclasses.dataclass(eq=False)
class BatchRun:
    """A batch on the device, with all that is needed to compute it once more."""

    batch: Batch
    way: Way
    began: float = dataclasses.field(default_factory=time.monotonic)
    """Seconds of `time.monotonic`."""
    resident: Bool[np.ndarray, "M E"] | None = None
    """The experts that were there when it was first dispatched, before it loaded what it missed."""
    seen: Bool[np.ndarray, "M E"] | None = None
    """The experts that were there when it was dispatched last."""
    outputs: Outputs | None = None
    read: Any = None
    """The same on the host, once it is known that no expert that was needed was absent."""
    sampling: Int32[np.ndarray, " words"] | None = None
    """How its tokens are drawn, as its sequences were when it was first dispatched; so are the adjustments."""
    adjustments: Adjustments | None = None
    words: Any = None
    """What it was told, on the device."""
    stops: Stops | None = None
    """Where its whole forward may be taken up again."""


class Runner:
    """Owns the weights and the KV cache on the device; the experts belong to `residency`."""

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
        self._residency = residency
        sharding = residency.slab.sharding
        self._cache = list(jax.device_put(cache, sharding))
        self._shapes = self._memory_shapes()
        self._last_tokens = jax.device_put(np.zeros(buckets.token_places, np.int32), sharding)
        self.tables = tables_of(buckets)
        self._device_tables: Int32[Array, "tables pages_per_sequence"] | None = None
        if buckets.keeps_tables:
            self._device_tables = jax.device_put(blank_tables(buckets), sharding)
        self._skeleton, leaves = step.Skeleton.split(model)
        self._leaves = jax.device_put(leaves, sharding)
        self._embedding: Float[Array, "V D"] = self._skeleton.join(self._leaves).embedding[...]
        self.layered = LayeredForward(model, self._leaves, residency, self.executables)

    def compute(self, run: BatchRun) -> Outputs:
        """Dispatch a batch, for the first time or again. Tokens are chosen, and what changes logits is made, while the
        forward runs. The outputs are on their way to the host.

        Raises what the expert store raises where the batch is computed layer by layer; the cache stays usable.
        """
        batch = run.batch
        run.seen = self._residency.table.resident_mask
        if run.resident is None:
            run.resident = run.seen
        words = run.words = self._words(batch)
        if run.way == "layered":
            outputs = self.layered.run(batch, words, self._cache, self._last_tokens)
        else:
            arguments = self._whole_arguments(words)
            cache, outputs = self.executables.call(
                step.whole_step, (batch.shape, self._shapes), *arguments, shape=batch.shape, **self._statics
            )
            self._cache = list(cache)
        return self.finish(run, outputs)

    def go_on(self, run: BatchRun, layer: int) -> Outputs:
        """Take up the whole forward of a batch at the router of a MoE layer, and go layer by layer from there on.

        Raises as `compute`. Only of a run that has `stops`.
        """
        assert run.stops is not None
        arguments = (run.batch, run.words, self._cache, self._last_tokens)
        return self.finish(run, self.layered.go_on(layer, run.stops, *arguments))

    def finish(self, run: BatchRun, outputs: step.StepOutputs) -> Outputs:
        """From the logits of a forward to the tokens."""
        batch, run.stops = run.batch, outputs.stops
        self._last_tokens = outputs.last_tokens
        tokens, logprobs = self._choose(run, outputs.logits)
        run.outputs = Outputs(
            outputs.report,
            tokens,
            logprobs,
            tuple(self._prompt_logprobs(batch, outputs.hidden)),
            None if self.recorder is None else outputs.ranked_probs,
            tuple(self._logits_at(outputs.logits, place) for place in batch.kept_places),
            self._comparison(batch, outputs.hidden),
        )
        for array in jax.tree.leaves(run.outputs):
            array.copy_to_host_async()
        return run.outputs

    def mend(self) -> bool:
        """After a failed step, with none in flight: replace device arrays that it has taken along.

        A call that fails may have deleted the KV cache that was donated to it, or return arrays that raise when they
        are read. Returns whether the KV cache is blank now, so that what its pages held must be computed again.
        """
        if not _is_readable(self._last_tokens):
            self._last_tokens = jax.device_put(
                np.zeros(self._last_tokens.shape, self._last_tokens.dtype), self._residency.slab.sharding
            )
        if self._device_tables is not None and not _is_readable(self._device_tables):
            self._device_tables = jax.device_put(blank_tables(self.buckets), self._residency.slab.sharding)
            self.tables.forget()
        lost = [index for index, layer_cache in enumerate(self._cache) if not _is_readable(layer_cache)]
        for index in lost:
            shapes = self._cache[index]
            blank = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), shapes)
            self._cache[index] = jax.device_put(blank, self._residency.slab.sharding)
        return bool(lost)

    def move_pages(self, moves: Mapping[int, int]) -> None:
        """Copy what is in some pages to others, once the steps in flight have written it."""
        for sources, targets in in_calls(moves):
            for index, layer_cache in enumerate(self._cache):
                self._cache[index] = move_pages(layer_cache, sources, targets)

    def resize_pages(self, layer: int, num_pages: int) -> None:
        """Give a layer another number of pages, while no step is in flight; the first ones keep what is in them."""
        old = self._cache[layer]
        self._cache[layer] = jax.block_until_ready(resize_pages(old, num_pages=num_pages))
        for array in jax.tree.leaves(old):
            array.delete()

    @property
    def workspace_bytes(self) -> int:
        """The most that a step takes of the device beside weights, slab and KV cache, of what was compiled so far."""
        return self.executables.workspace_bytes + bytes_beside(self.buckets, self.config.vocab_size)

    def memory_changed(self) -> None:
        """Slab or KV cache have other shapes: find the executables of these from now on."""
        self._shapes = self._memory_shapes()

    def mean_embedding(self, token_ids: Rows[int]) -> Float[Array, " D"]:
        """The mean of a prompt's input embeddings in float32, on its way to the host. Does not wait for the device."""
        tokens, most = np.asarray(token_ids, np.int32), EMBEDDINGS_AT_ONCE[-1]
        mean = jax.device_put(np.zeros(self.config.hidden_size, np.float32), self._residency.slab.sharding)
        for start in range(0, len(tokens), most):
            part = tokens[start : start + most]
            padded = np.zeros(next(size for size in EMBEDDINGS_AT_ONCE if size >= len(part)), np.int32)
            padded[: len(part)] = part
            counts = np.int32(len(part)), np.float32(len(tokens))
            mean = self.executables.call(step.add_embeddings, len(padded), mean, self._embedding, padded, *counts)
        mean.copy_to_host_async()
        return mean

    def logits(self, token_ids: Rows[int], allowance: Allowance) -> Float[np.ndarray, "T V"]:
        """Float32 logits of one uncached forward that may substitute so much; NaN where the model computes NaN.

        Layer by layer, and within a layer at most `UNCACHED_ROWS` tokens at a time. Beside what a step of so many
        tokens takes, the device holds the keys and values of one layer; scores exist for one block of keys.
        """
        return self.layered.logits(token_ids, allowance, self._cache[0], self._last_tokens)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compile every shape that `compute` can meet: whole forwards on a pool of threads, the rest beside it."""
        shapes = self.buckets.shapes
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            forwards = [pool.submit(self._compile_whole, shape) for shape in shapes]
            V, sharding = self.config.vocab_size, self._residency.slab.sharding
            forwards += [
                pool.submit(compile_choices, self.executables, self.buckets, B, V, sharding)
                for B in self.buckets.sequences
            ]
            forwards += [pool.submit(self._compile_after_prompts, shape.rows) for shape in shapes if shape.tiles]
            forwards.append(pool.submit(self._compile_of_rows))
            total, done = len(shapes) + len(forwards), 0
            for shape in shapes:
                if not self._residency.is_full:
                    self.layered.compile_waves(empty_batch(shape))
                    jax.block_until_ready(self.compute(BatchRun(empty_batch(shape), "layered")))
                done += 1
                if progress is not None:
                    progress(done, total)
            for forward in forwards:
                forward.result()
                done += 1
                if progress is not None:
                    progress(done, total)
        for shape in shapes:
            run = BatchRun(empty_batch(shape), "whole")
            jax.block_until_ready(self.compute(run))
            if run.stops is not None:
                jax.block_until_ready(self.go_on(run, 0))
        self.move_pages({0: 0})
        for size in EMBEDDINGS_AT_ONCE:
            jax.block_until_ready(self.mean_embedding([0] * size))

    def warm_up_in_pieces(self) -> Iterator[None]:
        """Most of it piece by piece, for the owner of the step while none is in flight; `warm_up` does the rest then.
        After `FIRST_PIECES` pieces a request can be answered: a short prompt that is alone.
        """
        number = len(self.buckets.sequences)
        decoding, reading = self.buckets.shapes[:number], self.buckets.shapes[number:]
        shapes = (decoding[0], reading[0], *decoding[1:], *reading[1:])
        ways: tuple[Way, ...] = ("whole",) if self._residency.is_full else ("whole", "layered")
        for way in ways:
            for shape in shapes:
                jax.block_until_ready(self.compute(BatchRun(empty_batch(shape), way)))
                yield
        V, sharding = self.config.vocab_size, self._residency.slab.sharding
        for B in self.buckets.sequences:
            compile_choices(self.executables, self.buckets, B, V, sharding)
            yield
        for shape in reading:
            self._compile_after_prompts(shape.rows)
            yield

    def _words(self, batch: Batch) -> Int32[Array, " words"]:
        """What a batch tells the device, with its block tables, on the device."""
        tables, shape = self._device_tables, batch.shape
        if tables is None:
            return jax.device_put(batch.words, self._residency.slab.sharding)
        update = batch.tables or TableUpdate.of_padding(shape)
        for new in update.before:
            tables = self.executables.call(step.write_pages, len(new), tables, new)
        head = batch.words[: StepInputs.packing(shape).words_before("block_tables")]
        arguments = (head, update.rows, update.lengths, update.new, tables)
        words, self._device_tables = self.executables.call(step.with_tables, shape, *arguments, shape=shape)
        return words

    def _choose(
        self, run: BatchRun, logits: Float[Array, "B V"]
    ) -> tuple[Int32[Array, " B"] | None, TokenLogprobs | None]:
        """Tokens and log probabilities of a batch in which a row asks for more than the most probable token."""
        B, sequences, choice = run.batch.shape.sequences, run.batch.sequences, run.batch.choice
        wants_logprobs = any(sequence.params.logprobs is not None for sequence in sequences)
        if run.adjustments is None:
            run.adjustments = adjustments_of(sequences, B, self.config.vocab_size)
        if choice == Choice() and run.adjustments is None and not wants_logprobs:
            return None, None
        if run.sampling is None:
            run.sampling = SamplingArrays.pack(sequences, B)
        left = logits if run.adjustments is None else self._adjusted(logits, run.adjustments)
        for by in choice.filters:
            left = self.executables.call(step.filter_logits, (B, by), left, run.sampling, by=by)
        arguments = (left, run.sampling, np.asarray(run.batch.inputs.token_places), self._last_tokens)
        tokens, self._last_tokens = self.executables.call(
            step.choose_tokens, (B, choice.random), *arguments, random=choice.random
        )
        return tokens, self.executables.call(step.chosen_logprobs, B, logits, tokens) if wants_logprobs else None

    def _adjusted(self, logits: Float[Array, "B V"], adjustments: Adjustments) -> Float[Array, "B V"]:
        B = logits.shape[0]
        for edits, room in adjustments.edits:
            logits = self.executables.call(step.edit_logits, (B, room), logits, edits, room=room)
        if adjustments.allowed is not None:
            logits = self.executables.call(step.mask_logits, B, logits, adjustments.allowed)
        return logits

    def _whole_arguments(self, words: Any) -> tuple[Any, ...]:
        residency = self._residency
        return (
            self._leaves,
            residency.slab.weights,
            residency.table.device_table(),
            tuple(self._cache),
            words,
            self._last_tokens,
        )

    def _prompt_logprobs(self, batch: Batch, hidden: Float[Array, "1 R D"]) -> Iterator[TokenLogprobs]:
        """Log probabilities of the prompts' tokens that follow those of a batch, for sequences that ask for them."""
        rows, targets = batch.prompt_targets()
        for first in range(0, len(rows), step.ROWS_TAKEN):
            part = slice(first, first + step.ROWS_TAKEN)
            arguments = (self._leaves, self._hidden_at(hidden, rows[part]), _padded(targets[part]))
            yield self.executables.call(step.prompt_logprobs, step.ROWS_TAKEN, *arguments, skeleton=self._skeleton)

    def _hidden_at(self, hidden: Float[Array, "1 R D"], rows: Rows[int] | np.ndarray) -> Float[Array, "n D"]:
        return self.executables.call(step.take_rows, hidden.shape[:-1], hidden, _padded(np.asarray(rows, np.int32)))

    def _logits_at(self, logits: Float[Array, "B V"], place: int) -> Float[Array, "1 V"]:
        return self.executables.call(step.take_rows, logits.shape[:-1], logits, np.array([place], np.int32))

    def _comparison(self, batch: Batch, hidden: Float[Array, "1 R D"]) -> step.Comparison | None:
        """Of the text that an audit computes with what was served, as far as it is in this batch."""
        audited = batch.audited_rows
        if audited is None or not len(audited.rows):
            return None
        x, served = self._hidden_at(hidden, audited.rows), _padded(audited.served.logits(audited.positions))
        return self.executables.call(step.compare_logits, len(served), self._leaves, x, served, skeleton=self._skeleton)

    def _memory_shapes(self) -> MemoryShapes:
        return MemoryShapes(self._residency.slab.capacities, tuple(layer.k.shape[0] for layer in self._cache))

    @property
    def _statics(self) -> dict[str, Any]:
        return {"skeleton": self._skeleton, "config": self.config}

    def _compile_whole(self, shape: Shape) -> None:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._residency.slab.sharding),
            self._whole_arguments(StepInputs.packing(shape).empty()),
        )
        self.executables.compile(step.whole_step, (shape, self._shapes), *shapes, shape=shape, **self._statics)

    def _compile_after_prompts(self, R: int) -> None:
        rows = np.zeros(step.ROWS_TAKEN, np.int32)
        self.executables.compile(step.take_rows, (1, R), self._hidden(1, R), rows)

    def _compile_of_rows(self) -> None:
        n, statics = step.ROWS_TAKEN, {"skeleton": self._skeleton}
        x, targets, served = self._hidden(n), np.zeros(n, np.int32), np.zeros((n, self.config.vocab_size), np.float32)
        self.executables.compile(step.prompt_logprobs, n, self._leaves, x, targets, **statics)
        self.executables.compile(step.compare_logits, n, self._leaves, x, served, **statics)

    def _hidden(self, *rows: int) -> jax.ShapeDtypeStruct:
        shape = (*rows, self.config.hidden_size)
        return jax.ShapeDtypeStruct(shape, self._leaves[0].dtype, sharding=self._residency.slab.sharding)


def _padded(rows: np.ndarray) -> np.ndarray:
    """With zeros, up to `ROWS_TAKEN` rows."""
    return np.concatenate([rows, np.zeros((step.ROWS_TAKEN - len(rows), *rows.shape[1:]), rows.dtype)])


def _is_readable(arrays: Any) -> bool:
    """Whether these device arrays exist and were computed without an error. Waits for them."""
    try:
        jax.block_until_ready(arrays)
    except RuntimeError:  # deleted, or the error of the call that should have computed them
        return False
    return True
