"""Penalties, biases, grammars and forced tokens of a batch, applied to its logits before tokens are chosen."""

from __future__ import annotations

import functools
from collections.abc import Sequence as Rows
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from emoe_jax.device.packing import Packing
from emoe_jax.requests.adjustment import LogitAdjustment
from emoe_jax.requests.sequence import Sequence

ROOMS = (2**9, 2**13, 2**17)
"""Entries that are sent for so many changed tokens or fewer. All are compiled at the start. More changes than the
largest has room for are sent in several calls, so that what they take of the device is known at the start, too.
"""


class TokenEdits(NamedTuple):
    """Changes of single tokens' logits in a batch of `B` rows. Entries that pad have row `B`."""

    rows: Int32[Any, " n"]
    tokens: Int32[Any, " n"]
    bias: Float32[Any, " n"]
    repeated: Bool[Any, " n"]
    repetition: Float32[Any, " B"]

    @staticmethod
    @functools.cache
    def packing(size: int, room: int) -> Packing:
        """How `room` entries for `size` rows lie in one buffer."""
        entries = (room,)
        return Packing(
            rows=(entries, np.int32),
            tokens=(entries, np.int32),
            bias=(entries, np.float32),
            repeated=(entries, np.bool_),
            repetition=((size,), np.float32),
        )

    @classmethod
    def empty(cls, size: int, room: int) -> tuple[Int32[np.ndarray, " words"], TokenEdits]:
        """A buffer that changes nothing, and views of it."""
        packing = cls.packing(size, room)
        buffer = packing.empty()
        edits = cls(**packing.views(buffer))
        edits.rows[:] = size
        edits.repetition[:] = 1.0
        return buffer, edits

    @classmethod
    def pack(cls, adjustments: Rows[LogitAdjustment | None], size: int, vocab_size: int) -> list[PackedEdits]:
        """The buffers for these rows, in order; none where no token's logit changes."""
        changes = [(row, each, each.changes) for row, each in enumerate(adjustments) if each is not None]
        total = sum(len(change.tokens) for _, _, change in changes)
        if not total:
            return []
        room = room_for(total, size * vocab_size)
        rows = np.repeat([row for row, _, _ in changes], [len(change.tokens) for _, _, change in changes])
        columns = rows, *map(np.concatenate, zip(*(change for _, _, change in changes), strict=True))
        packed = []
        for first in range(0, total, room):
            buffer, edits = cls.empty(size, room)
            last = min(first + room, total)
            for entries, column in zip(edits, columns, strict=False):
                entries[: last - first] = column[first:last]
            for row, adjustment, _ in changes:
                edits.repetition[row] = adjustment.repetition
            packed.append(PackedEdits(buffer, room))
        return packed

    def apply(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Repetition divides positive logits of repeated tokens and multiplies negative ones; then the bias is added.

        Worked example, repetition 2, tokens 0 and 1 repeated, bias -1 on token 2: [4, -1, 3] -> [2, -2, 2].
        """
        found = logits.at[self.rows, self.tokens].get(mode="clip")
        repetition = jnp.asarray(self.repetition).at[self.rows].get(mode="clip")
        held_back = jnp.where(found > 0, found / repetition, found * repetition)
        changed = jnp.where(self.repeated, held_back, found) + self.bias
        return logits.at[self.rows, self.tokens].set(changed, mode="drop")


class PackedEdits(NamedTuple):
    """`TokenEdits` in one buffer."""

    buffer: Int32[np.ndarray, " words"]
    room: int
    """Entries that it has."""


class Adjustments(NamedTuple):
    """What changes the logits of a batch, on the host. At least one of the two is there."""

    edits: list[PackedEdits]
    """One after the other; no two of them change the same logit."""
    allowed: UInt32[np.ndarray, "B W"] | None
    """A bit per token, the lowest first."""


def room_for(changes: int, logits: int) -> int:
    """Entries that are sent at once where so many of the batch's logits change."""
    return min(next((room for room in ROOMS if room >= changes), ROOMS[-1]), logits)


def usual_rooms(logits: int) -> list[int]:
    """The numbers of entries that batches with so many logits are prepared for."""
    return sorted({room_for(room, logits) for room in ROOMS})


def adjustments_of(sequences: Rows[Sequence], size: int, vocab_size: int) -> Adjustments | None:
    """What changes the logits of these sequences' next tokens, padded to `size` rows; None where nothing does."""
    adjustments = [sequence.adjustment for sequence in sequences]
    for sequence, adjustment in zip(sequences, adjustments, strict=True):
        if adjustment is not None:
            adjustment.update(sequence.generated)
    allowed = [
        None if adjustment is None else adjustment.allowed(sequence.num_sampled)
        for sequence, adjustment in zip(sequences, adjustments, strict=True)
    ]
    found = Adjustments(TokenEdits.pack(adjustments, size, vocab_size), _masks(allowed, size))
    return None if not found.edits and found.allowed is None else found


def all_allowed(size: int, vocab_size: int) -> UInt32[np.ndarray, "B W"]:
    """Masks that forbid nothing."""
    return np.full((size, -(-vocab_size // 32)), 2**32 - 1, np.uint32)


def only_allowed(logits: Float[Array, "B V"], allowed: UInt32[Array, "B W"]) -> Float[Array, "B V"]:
    """Logits in which what is not allowed is impossible."""
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & 1
    return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def _masks(allowed: Rows[UInt32[np.ndarray, " W"] | None], size: int) -> UInt32[np.ndarray, "B W"] | None:
    """Of all rows; None where none has one."""
    width = next((len(mask) for mask in allowed if mask is not None), None)
    if width is None:
        return None
    masks = np.full((size, width), 2**32 - 1, np.uint32)
    for row, mask in enumerate(allowed):
        if mask is not None:
            masks[row] = mask
    return masks
