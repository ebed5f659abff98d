"""Runs step plans on the device: pads them to buckets, calls the jitted step, reads the tokens back."""

import dataclasses
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.engine import step
from emoe_jax.engine.kv_cache import KVCache, pages_for
from emoe_jax.engine.request import RoutingContract
from emoe_jax.engine.sampling import SamplingArrays
from emoe_jax.engine.scheduler import SampledToken, StepPlan, StepResult
from emoe_jax.engine.sequence import Sequence
from emoe_jax.errors import RequestError
from emoe_jax.experts.residency import Residency
from emoe_jax.models.decoder import Decoder

Progress = Callable[[int, int], None]
"""Called with `(done, total)`."""


def _ladder(first: int, last: int, factor: int) -> tuple[int, ...]:
    """`first`, then multiples by `factor` below `last`, then `last`."""
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= factor
    return (*sizes, last)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes a step may have. All are compiled in `warm_up`, none after."""

    sequences: tuple[int, ...]
    chunk_tokens: tuple[int, ...]
    pages: tuple[int, ...]

    @classmethod
    def of(cls, max_num_seqs: int, prefill_chunk: int, max_model_len: int) -> "Buckets":
        return cls(
            sequences=_ladder(1, max_num_seqs, 2),
            chunk_tokens=_ladder(min(32, prefill_chunk), prefill_chunk, 4),
            pages=_ladder(min(pages_for(256), pages_for(max_model_len)), pages_for(max_model_len), 4),
        )

    def shapes(self) -> list[tuple[int, int, int]]:
        """All `(B, T, pages)`: a decode has one token per sequence, a prefill chunk one sequence."""
        batches = [(B, 1) for B in self.sequences] + [(1, T) for T in self.chunk_tokens if T > 1]
        return [(B, T, pages) for B, T in batches for pages in self.pages]


def _fit(size: int, ladder: tuple[int, ...]) -> int:
    return next(bucket for bucket in ladder if bucket >= size)


class _Piece(NamedTuple):
    """Tokens of one sequence that a step feeds."""

    sequence: Sequence
    start: int
    length: int
    samples: bool


class _Batch(NamedTuple):
    pieces: tuple[_Piece, ...]
    routing: RoutingContract
    inputs: step.StepInputs
    sampling: SamplingArrays
    want_logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class RunResult(StepResult):
    """A step's tokens, and what its routers wished for."""

    wish_counts: Int[np.ndarray, "M E"]


class Runner:
    """Owns the weights and the KV cache on the device; the slab and its table belong to the loading side.

    Sequences of one plan are grouped into at most one decode batch per routing contract and one batch per prompt
    chunk. All calls are dispatched before the first result is read.
    """

    def __init__(
        self,
        model: Decoder,
        residency: Residency,
        cache: KVCache,
        buckets: Buckets,
    ):
        self.config: ModelConfig = model.config
        self.buckets = buckets
        self._residency = residency
        self._slab = residency.slab
        self._table = residency.table
        # All on the slab's device from the start: a step compiled for unplaced arrays would compile again later.
        self._cache = list(jax.device_put(cache, residency.slab.sharding))
        self._skeleton, leaves = step.Skeleton.split(model)
        self._leaves = jax.device_put(leaves, residency.slab.sharding)
        self._layers = [
            (skeleton, jax.device_put(leaves, residency.slab.sharding))
            for skeleton, leaves in (step.Skeleton.split(layer) for layer in model.layers)
        ]

    def run(self, plan: StepPlan) -> RunResult:
        """Execute one plan. Counts each sequence's expert assignments; raises nothing a request could cause."""
        batches = self._batches(plan)
        outputs = jax.device_get([self._run_batch(batch) for batch in batches])
        sampled: dict[Sequence, SampledToken] = {}
        wish_counts = np.zeros((len(self.config.moe_layers), self.config.num_experts), np.int64)
        for batch, output in zip(batches, outputs, strict=True):
            wish_counts += output.wish_counts
            for row, piece in enumerate(batch.pieces):
                piece.sequence.substituted += int(output.substituted[row])
                piece.sequence.assigned += piece.length * len(self.config.moe_layers) * self.config.top_k
                if piece.samples:
                    sampled[piece.sequence] = _sampled_token(piece.sequence, output.sampled, row)
        return RunResult(sampled, wish_counts)

    def logits(self, token_ids: Rows[int], routing: RoutingContract) -> Float[np.ndarray, "T V"]:
        """Float32 logits of one uncached forward under a routing contract."""
        length = len(token_ids)
        if not 0 < length <= self.config.max_position:
            raise RequestError(f"{length} tokens given; expected 1 to {self.config.max_position}", param="token_ids")
        size = 1 << (length - 1).bit_length()
        tokens = np.zeros((1, size), np.int32)
        tokens[0, :length] = token_ids
        inputs = step.StepInputs(
            tokens, np.zeros(1, np.int32), np.full(1, length, np.int32), np.zeros((1, 1), np.int32)
        )
        x, _ = self._layer_by_layer(inputs, routing, cached=False)
        return np.asarray(step.all_logits(self._leaves, x, skeleton=self._skeleton))[0, :length]

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compile every shape that `run` can meet, writing to the trash page only."""
        shapes = self.buckets.shapes()
        contracts: tuple[RoutingContract, ...] = ("resident",) if self._residency.is_full else ("resident", "exact")
        done = 0
        for B, T, pages in shapes:
            inputs = step.StepInputs(
                np.zeros((B, T), np.int32),
                np.zeros(B, np.int32),
                np.zeros(B, np.int32),
                np.zeros((B, pages), np.int32),
            )
            for routing in contracts:
                batch = _Batch((), routing, inputs, SamplingArrays.of([], B), np.asarray(False))
                jax.block_until_ready(self._run_batch(batch))
                done += 1
                if progress is not None:
                    progress(done, len(shapes) * len(contracts))

    def _batches(self, plan: StepPlan) -> list[_Batch]:
        decodes = [_Piece(sequence, sequence.num_computed, 1, True) for sequence in plan.decodes]
        groups = [
            [piece for piece in decodes if piece.sequence.routing == routing] for routing in ("resident", "exact")
        ]
        groups += [[_Piece(chunk.sequence, chunk.start, chunk.length, chunk.is_last)] for chunk in plan.prefills]
        return [self._pad(pieces) for pieces in groups if pieces]

    def _pad(self, pieces: list[_Piece]) -> _Batch:
        """The smallest bucket that holds these pieces, as arrays."""
        length = max(piece.length for piece in pieces)
        B = _fit(len(pieces), self.buckets.sequences)
        T = 1 if length == 1 else _fit(length, self.buckets.chunk_tokens)
        pages = _fit(max(pages_for(piece.start + piece.length) for piece in pieces), self.buckets.pages)
        tokens, starts = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
        lengths, block_tables = np.zeros(B, np.int32), np.zeros((B, pages), np.int32)
        for row, piece in enumerate(pieces):
            tokens[row, : piece.length] = piece.sequence.tokens(piece.start, piece.length)
            starts[row], lengths[row] = piece.start, piece.length
            held = piece.sequence.pages[:pages]
            block_tables[row, : len(held)] = held
        sequences = [piece.sequence for piece in pieces]
        wants = any(sequence.params.logprobs is not None for sequence in sequences)
        return _Batch(
            tuple(pieces),
            sequences[0].routing,
            step.StepInputs(tokens, starts, lengths, block_tables),
            SamplingArrays.of(sequences, B),
            np.asarray(wants),
        )

    def _run_batch(self, batch: _Batch) -> step.StepOutputs:
        if batch.routing == "exact" and not self._residency.is_full:
            return self._run_exact(batch)
        cache, outputs = step.resident_step(
            self._leaves,
            self._slab.weights,
            self._table.device_table(),
            tuple(self._cache),
            batch.inputs,
            batch.sampling,
            batch.want_logprobs,
            skeleton=self._skeleton,
            config=self.config,
        )
        self._cache = list(cache)
        return outputs

    def _run_exact(self, batch: _Batch) -> step.StepOutputs:
        x, wish_counts = self._layer_by_layer(batch.inputs, "exact", cached=True)
        sampled = step.choose_tokens(
            self._leaves, x, batch.inputs.lengths, batch.sampling, batch.want_logprobs, skeleton=self._skeleton
        )
        nobody = np.zeros(len(batch.inputs.lengths), np.int32)
        return step.StepOutputs(sampled, np.stack(wish_counts), nobody)

    def _layer_by_layer(
        self, inputs: step.StepInputs, routing: RoutingContract, *, cached: bool
    ) -> tuple[Float[Array, "B T D"], list[np.ndarray]]:
        """A forward that stops at every router: the `exact` contract, and forwards without the cache.

        Returns the last hidden states and the wish counts per MoE layer. The cache is kept layer by layer, so that a
        failing load leaves no donated array behind.
        """
        config = self.config
        x = step.embed(self._leaves, inputs.tokens, skeleton=self._skeleton)
        wish_counts: list[np.ndarray] = []
        for index, (skeleton, leaves) in enumerate(self._layers):
            layer_cache = self._cache[index] if cached else None
            window = config.sliding_window(index)
            if not config.is_moe(index):
                layer_cache, x = step.dense_layer(
                    leaves, x, layer_cache, inputs, skeleton=skeleton, config=config, window=window
                )
                if layer_cache is not None:
                    self._cache[index] = layer_cache
            else:
                m = len(wish_counts)
                layer_cache, routed, total = step.attend_and_route(
                    leaves,
                    x,
                    layer_cache,
                    inputs,
                    self._table.resident_mask[m],
                    skeleton=skeleton,
                    config=config,
                    window=window,
                    restricted=routing == "resident",
                )
                if layer_cache is not None:
                    self._cache[index] = layer_cache
                counts = np.asarray(routed.wish_counts)
                for slots in self._waves_of(m, counts, routing):
                    total = step.expert_wave(routed, slots, self._slab.weights[m], total, config=config)
                x = step.close_moe(leaves, routed, total, skeleton=skeleton)
                wish_counts.append(counts)
        return x, wish_counts

    def _waves_of(
        self, m: int, wish_counts: Int[np.ndarray, " E"], routing: RoutingContract
    ) -> Iterable[Int[np.ndarray, " E"]]:
        """Slots of the experts that take part, per call of the MoE op: the resident ones, or the wished in waves."""
        if routing == "resident":
            return (self._table.slot_of_expert[m].copy(),)
        return self._residency.waves.waves(m, wish_counts)


def _sampled_token(sequence: Sequence, sampled: step.Sampled, row: int) -> SampledToken:
    token, wanted = int(sampled.tokens[row]), sequence.params.logprobs
    if wanted is None:
        return SampledToken(token)
    top = tuple(
        (int(i), float(p))
        for i, p in zip(sampled.top_ids[row, :wanted], sampled.top_logprobs[row, :wanted], strict=True)
    )
    return SampledToken(token, float(sampled.logprob[row]), top)
