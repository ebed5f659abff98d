"""From a step plan to padded arrays: batches in a few fixed shapes."""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import NamedTuple

import numpy as np

from emoe_jax.device.sampler import SamplingArrays
from emoe_jax.device.step import StepInputs
from emoe_jax.requests.request import RoutingContract
from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.pages import pages_for
from emoe_jax.scheduling.plan import StepPlan

UNCACHED_ROWS = 512
"""Tokens that an uncached forward computes at a time. Up to so many attend to each other in one block."""


class Shape(NamedTuple):
    """`B` sequences of `T` new tokens each, with block tables of `pages` pages each."""

    sequences: int
    tokens: int
    pages: int


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes that batches are padded to. A decode has one token per sequence, a prefill chunk one sequence.

    Block tables always have room for the longest sequence: attention goes no further than it must.
    """

    sequences: tuple[int, ...]
    chunk_tokens: tuple[int, ...]
    pages: int

    @classmethod
    def of(cls, max_num_seqs: int, prefill_chunk: int, max_model_len: int) -> "Buckets":
        """The buckets of an engine's limits. `prefill_chunk` and `max_model_len` are in tokens."""
        return cls(
            sequences=_ladder(1, max_num_seqs),
            chunk_tokens=_ladder(min(32, prefill_chunk), prefill_chunk),
            pages=pages_for(max_model_len),
        )

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """All shapes that `fit` may return, decodes first. The engine compiles each of them."""
        batches = [(B, 1) for B in self.sequences] + [(1, T) for T in self.chunk_tokens if T > 1]
        return tuple(Shape(B, T, self.pages) for B, T in batches)

    def fit(self, sequences: int, tokens: int) -> Shape:
        """The smallest shape that holds so many."""
        chunk = 1 if tokens == 1 else _fit(tokens, self.chunk_tokens)
        return Shape(_fit(sequences, self.sequences), chunk, self.pages)


class Piece(NamedTuple):
    """Tokens of one sequence that a step feeds; the last piece of a prompt, and every decode, samples."""

    sequence: Sequence
    start: int
    length: int
    samples: bool


class Batch(NamedTuple):
    """Pieces that run in one call, and the arrays they were padded to."""

    pieces: tuple[Piece, ...]
    routing: RoutingContract
    shape: Shape
    inputs: StepInputs
    sampling: SamplingArrays
    want_logprobs: np.ndarray

    def await_tokens(self, places: Mapping[Sequence, int]) -> None:
        """Feed tokens that the host does not know from where the plan before has put them on the device."""
        for row, (sequence, start, *_) in enumerate(self.pieces):
            if start >= sequence.num_known:
                self.inputs.tokens[row, 0] = -1 - places[sequence]

    def prompt_targets(self) -> np.ndarray | None:
        """Of a prompt's chunk, the token that follows each of its own (0 past the prompt): `[T]`.

        None when the sequence does not ask for their log probabilities.
        """
        if len(self.pieces) != 1 or self.pieces[0].sequence.params.prompt_logprobs is None:
            return None
        sequence, start, length, _ = self.pieces[0]
        following = sequence.prompt_token_ids[start + 1 : start + 1 + length]
        if not following:
            return None
        targets = np.zeros(self.shape.tokens, np.int32)
        targets[: len(following)] = following
        return targets


def batches_of(plan: StepPlan, buckets: Buckets) -> list[Batch]:
    """At most one batch of decodes per routing contract, and one per prompt chunk."""
    decodes = [Piece(sequence, sequence.num_computed, 1, True) for sequence in plan.decodes]
    groups = [[piece for piece in decodes if piece.sequence.routing == routing] for routing in ("resident", "exact")]
    groups += [[Piece(chunk.sequence, chunk.start, chunk.length, chunk.is_last)] for chunk in plan.prefills]
    return [_pad(pieces, buckets) for pieces in groups if pieces]


def empty_batch(shape: Shape, routing: RoutingContract) -> Batch:
    """Nothing but padding, which writes to the trash page only."""
    B, T, pages = shape
    inputs = StepInputs(
        np.zeros((B, T), np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32), np.zeros((B, pages), np.int32)
    )
    return Batch((), routing, shape, inputs, SamplingArrays.of([], B), np.asarray(False))


def uncached_batches(token_ids: Rows[int], routing: RoutingContract) -> list[Batch]:
    """A text in batches of at most `UNCACHED_ROWS` tokens, for a forward that has pages `1, 2, ...` to itself.

    A text that fits one batch needs no pages. The shapes are powers of two, so that few are compiled.
    """
    length = len(token_ids)
    rows = min(1 << (length - 1).bit_length(), UNCACHED_ROWS)
    pages = pages_for(1 << (length - 1).bit_length()) if length > rows else 0
    batches = []
    for start in range(0, length, rows):
        batch = empty_batch(Shape(1, rows, pages), routing)
        count = min(rows, length - start)
        batch.inputs.tokens[0, :count] = token_ids[start : start + count]
        batch.inputs.starts[0], batch.inputs.lengths[0] = start, count
        batch.inputs.block_tables[0] = np.arange(1, pages + 1)
        batches.append(batch)
    return batches


def _pad(pieces: list[Piece], buckets: Buckets) -> Batch:
    shape = buckets.fit(len(pieces), max(piece.length for piece in pieces))
    inputs = empty_batch(shape, "resident").inputs
    for row, piece in enumerate(pieces):
        known = piece.sequence.tokens(piece.start, piece.length)
        inputs.tokens[row, : len(known)] = known
        inputs.starts[row], inputs.lengths[row] = piece.start, piece.length
        inputs.block_tables[row, : len(piece.sequence.pages)] = piece.sequence.pages
    sequences = [piece.sequence for piece in pieces]
    wants = any(sequence.params.logprobs is not None for sequence in sequences)
    sampling = SamplingArrays.of(sequences, shape.sequences)
    return Batch(tuple(pieces), sequences[0].routing, shape, inputs, sampling, np.asarray(wants))


def _ladder(first: int, last: int) -> tuple[int, ...]:
    """`first`, then twice as much each time below `last`, then `last`."""
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= 2
    return (*sizes, last)


def _fit(size: int, ladder: tuple[int, ...]) -> int:
    return next(bucket for bucket in ladder if bucket >= size)
