"""From a step plan to flat batches, each in one of a few shapes."""

import dataclasses
import functools
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from emoe_jax.device.block_tables import BlockTables, TableUpdate
from emoe_jax.device.inputs import StepInputs
from emoe_jax.device.sampler import Choice
from emoe_jax.device.shapes import Buckets, Shape
from emoe_jax.requests.contract import Allowance
from emoe_jax.requests.sequence import Sequence
from emoe_jax.requests.served import ServedLogits
from emoe_jax.scheduling.pages import pages_for
from emoe_jax.scheduling.plan import StepPlan

UNCACHED_ROWS = 512
"""Tokens that an uncached forward computes at a time. Up to so many attend to each other in one block."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens of one sequence that a step feeds; the last piece of a prompt, and every decode, samples."""

    sequence: Sequence
    start: int
    length: int
    samples: bool

    @property
    def token(self) -> int:
        """The number within the answer of the token that it samples."""
        return self.start + self.length - len(self.sequence.prompt_token_ids)


class AuditedRows(NamedTuple):
    """The rows of a batch whose logits an audit compares."""

    served: ServedLogits
    positions: Int[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pieces that run in one call. The piece at index `p` has place `p`, and the rows from `first_rows[p]` on."""

    pieces: tuple[Piece, ...]
    shape: Shape
    words: Int32[np.ndarray, " words"]
    """What the device is told, laid out by `StepInputs.packing`."""
    first_rows: tuple[int, ...] = ()
    tables: TableUpdate | None = None
    """Where block tables are kept on the device: what they are told. Those in `words` are blank then."""

    @functools.cached_property
    def inputs(self) -> StepInputs:
        """Views of `words`."""
        return StepInputs(**StepInputs.packing(self.shape).views(self.words))

    @property
    def sequences(self) -> list[Sequence]:
        """By place."""
        return [piece.sequence for piece in self.pieces]

    @property
    def choice(self) -> Choice:
        """What the sampler has to do."""
        return Choice.of([piece.sequence for piece in self.pieces if piece.samples])

    @functools.cached_property
    def may_need(self) -> bool:
        """Whether some row may need an expert that is absent: one that is not under `resident`."""
        return bool(np.isfinite(self.inputs.tolerances[: max(1, len(self.pieces))]).any())

    @functools.cached_property
    def kept_places(self) -> list[int]:
        """The places whose logits are kept for an audit."""
        return [
            place
            for place, piece in enumerate(self.pieces)
            if piece.samples
            and piece.sequence.served is not None
            and piece.sequence.served.slot(piece.token) is not None
        ]

    @functools.cached_property
    def audited_rows(self) -> AuditedRows | None:
        """None where no text is audited: there is at most one."""
        for first, piece in zip(self.first_rows, self.pieces, strict=True):
            served = piece.sequence.compared_with
            if served is not None:
                positions = served.positions
                positions = positions[(positions >= piece.start) & (positions < piece.start + piece.length)]
                return AuditedRows(served, positions, first + positions - piece.start)
        return None

    def rows(self, place: int) -> slice:
        """The rows of a piece."""
        return slice(self.first_rows[place], self.first_rows[place] + self.pieces[place].length)

    def keep_tokens(self, places: dict[Sequence, int], first: int) -> None:
        """Keep the tokens that the batch samples for the plan that follows, from place `first` on behind those in
        `places`, which learns of them.
        """
        kept = self.inputs.token_places
        for place, piece in enumerate(self.pieces):
            if piece.samples:
                kept[place] = places[piece.sequence] = first + len(places)

    def await_tokens(self, places: Mapping[Sequence, int]) -> None:
        """Feed tokens that the host does not know from where the plan before has put them on the device."""
        tokens = self.inputs.tokens
        for place, piece in enumerate(self.pieces):
            if piece.start >= piece.sequence.num_known:
                tokens[self.first_rows[place]] = -1 - places[piece.sequence]

    def prompt_targets(self) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]:
        """The rows of prompts whose sequences ask for log probabilities, piece by piece, and the tokens that follow.

        A piece has as many as `following` has tokens.
        """
        rows: list[int] = []
        targets: list[int] = []
        for first, piece in zip(self.first_rows, self.pieces, strict=True):
            following = self.following(piece)
            rows += range(first, first + len(following))
            targets += following
        return np.array(rows, np.int32), np.array(targets, np.int32)

    def following(self, piece: Piece) -> list[int]:
        """The tokens of a prompt after each of a piece's own; none for a sequence that does not ask for theirs."""
        if piece.sequence.params.prompt_logprobs is None:
            return []
        return piece.sequence.prompt_token_ids[piece.start + 1 : piece.start + 1 + piece.length]


def batches_of(plan: StepPlan, buckets: Buckets, tables: BlockTables, *, alone: bool = False) -> list[Batch]:
    """One batch, and further ones where the prompts do not fit its tiles. Rows keep the contracts of their sequences.

    With `alone` each prompt is in a batch of its own, and so are the sequences that decode.
    """
    decodes = [Piece(each, each.num_computed, 1, True) for each in plan.decodes]
    chunks = [Piece(chunk.sequence, chunk.start, chunk.length, chunk.is_last) for chunk in plan.prefills]
    parts = [decodes, *([chunk] for chunk in chunks)] if alone else _parts(decodes, chunks, buckets)
    return [_filled(part, buckets, tables) for part in parts if part]


def empty_batch(shape: Shape) -> Batch:
    """Nothing but padding, which writes to the trash page only."""
    batch = Batch((), shape, StepInputs.packing(shape).empty())
    batch.inputs.token_places[:] = np.iinfo(np.int32).max
    return batch


def uncached_batches(token_ids: Rows[int], allowance: Allowance) -> list[Batch]:
    """A text in batches of at most `UNCACHED_ROWS` tokens, for a forward that has pages `1, 2, ...` to itself.

    A text that fits one batch needs no pages. The shapes are powers of two, so that few are compiled.
    """
    length = len(token_ids)
    rows = min(1 << (length - 1).bit_length(), UNCACHED_ROWS)
    pages = pages_for(1 << (length - 1).bit_length()) if length > rows else 0
    batches = []
    for start in range(0, length, rows):
        batch = empty_batch(uncached_shape(rows, pages))
        count = min(rows, length - start)
        inputs = batch.inputs
        inputs.tokens[:count] = token_ids[start : start + count]
        inputs.starts[0], inputs.lengths[0] = start, count
        _allow(inputs, [allowance])
        inputs.block_tables[0] = np.arange(1, pages + 1)
        batches.append(batch)
    return batches


def uncached_shape(rows: int, pages: int) -> Shape:
    """Of one sequence whose rows are one tile."""
    return Shape(sequences=1, decodes=0, tiles=1, tile=rows, pages=pages)


def _chunks(pieces: Rows[Piece]) -> list[int]:
    """The lengths of the pieces that need tiles: one token has the row of its place."""
    return [piece.length for piece in pieces if piece.length > 1]


def _parts(decodes: list[Piece], chunks: list[Piece], buckets: Buckets) -> list[list[Piece]]:
    """The sequences that decode, and as many prompts with them as there are tiles for; then further prompts."""
    parts = [decodes]
    for chunk in chunks:
        if not buckets.fits(_chunks([*parts[-1], chunk])):
            parts.append([])
        parts[-1].append(chunk)
    return parts


def _filled(pieces: list[Piece], buckets: Buckets, tables: BlockTables) -> Batch:
    batch = empty_batch(buckets.fit(len(pieces), _chunks(pieces)))
    shape, inputs, count = batch.shape, batch.inputs, len(pieces)
    tokens, starts, last_rows, next_tile = [0] * count, [0] * count, list(range(count)), 0
    first_rows = last_rows.copy()
    for place, piece in enumerate(pieces):
        if piece.length > 1:
            first_rows[place] = _fill_tiles(inputs, shape, next_tile, place, piece)
            last_rows[place] = first_rows[place] + piece.length - 1
            next_tile += -(-piece.length // shape.tile)
        else:
            starts[place] = piece.start
            tokens[place : place + 1] = piece.sequence.tokens(piece.start, 1) or [0]  # else it is still awaited
    inputs.tokens[:count], inputs.starts[:count], inputs.last_rows[:count] = tokens, starts, last_rows
    inputs.lengths[:count] = [piece.length == 1 for piece in pieces]
    _allow(inputs, [piece.sequence.allowance for piece in pieces])
    update = tables.place([piece.sequence for piece in pieces], shape, np.asarray(inputs.block_tables))
    return Batch(tuple(pieces), shape, batch.words, tuple(first_rows), update)


def _fill_tiles(inputs: StepInputs, shape: Shape, first: int, place: int, piece: Piece) -> int:
    """Put a chunk of a prompt in tiles, from the one of this number on. Returns its first row."""
    needed = -(-piece.length // shape.tile)
    group, row = shape.decodes + first, shape.decodes + first * shape.tile
    before = shape.tile * np.arange(needed, dtype=np.int32)
    inputs.tile_places[first : first + needed] = place
    inputs.starts[group : group + needed] = piece.start + before
    inputs.lengths[group : group + needed] = np.minimum(piece.length - before, shape.tile)
    inputs.tokens[row : row + piece.length] = piece.sequence.tokens(piece.start, piece.length)
    return row


def _allow(inputs: StepInputs, allowances: Rows[Allowance]) -> None:
    """What the sequences of the first places may give up."""
    count = len(allowances)
    inputs.tolerances[:count] = [each.tolerance for each in allowances]
    inputs.budgets[:count] = [each.budget for each in allowances]
    inputs.sacred[:count] = [each.sacred for each in allowances]
