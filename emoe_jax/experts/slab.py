"""The fixed-capacity home of the resident experts on the device."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Num

from emoe_jax.experts.huge_pages import use_huge_pages
from emoe_jax.experts.pieces import PIECE_BYTES, HostRecord, Piece, Rounds
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.experts.store import aligned_record
from emoe_jax.experts.weights import ExpertWeights

# One compiled commit per size. A batch is cut into these, largest first, because a padded entry costs a full copy.
COMMIT_SIZES = (8, 4, 2, 1)

_PADDED_BELOW = 256 << 10
"""Bytes of a record: a copy of fewer takes less time than a call of its own, so the next larger size is filled up."""


@functools.partial(jax.jit, donate_argnames=("weights",))
def commit_experts(
    weights: ExpertWeights, staged: tuple[Num[Array, " numbers"], ...], slots: Int32[Array, " n"]
) -> ExpertWeights:
    """Write staged records into slots of one layer, in place. Donates `weights`.

    Records are taken whole and cut here, so that staging is one transfer per expert and this is one copy. Slots must be
    below C: a scatter with `mode="drop"` would skip others, but reads the old weights of every slot it writes.
    """
    arrays, structure = jax.tree.flatten(weights)
    for index, record in enumerate(staged):
        parts = _arrays_of(record, arrays)
        arrays = [
            jax.lax.dynamic_update_index_in_dim(array, part, slots[index], axis=0)
            for array, part in zip(arrays, parts, strict=True)
        ]
    return jax.tree.unflatten(structure, arrays)


def _arrays_of(record: Num[Array, " numbers"], arrays: Sequence[Array]) -> Iterator[Array]:
    """What a record has for one slot of each of these arrays of a layer."""
    start = 0
    for array in arrays:
        shape = array.shape[1:]
        numbers = math.prod(shape) * array.dtype.itemsize // record.dtype.itemsize
        yield _numbers(record[start : start + numbers], array.dtype).reshape(shape)
        start += numbers


def _numbers(part: Num[Array, " numbers"], dtype: jnp.dtype) -> Num[Array, " n"]:
    """Numbers of `dtype`, of which a part of a record has the bytes."""
    if part.dtype == dtype:
        return part
    return jax.lax.bitcast_convert_type(part.reshape(-1, dtype.itemsize // part.dtype.itemsize), dtype)


@functools.partial(jax.jit, donate_argnames=("array",))
def write_piece(
    array: Num[Array, "C O *I"], piece: Num[Array, " numbers"], slot: np.int32, row: np.int32
) -> Num[Array, "C O *I"]:
    """Write the rows of a staged piece into a slot, from `row` on, in place. Donates `array`."""
    rows = _numbers(piece, array.dtype).reshape(1, -1, *array.shape[2:])
    return jax.lax.dynamic_update_slice(array, rows, (slot, row, *[np.int32(0)] * (array.ndim - 2)))


@functools.partial(jax.jit, donate_argnames=("target",))
def copy_experts(
    target: ExpertWeights, source: ExpertWeights, slots: Int32[Array | np.ndarray, " n"], count: Int32[Array, ""] | int
) -> ExpertWeights:
    """`target` with the first `count` of these slots of another slab layer in its first slots. Donates `target`."""

    def copy(index: Array, target: ExpertWeights) -> ExpertWeights:
        def slot(to: Array, of: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(to, of[slots[index]], index, axis=0)

        return jax.tree.map(slot, target, source)

    return jax.lax.fori_loop(0, count, copy, target)


class ExpertSlab:
    """Device weights of every MoE layer's slots, zero until committed to.

    `weights` is what a step reads. A commit donates the layer's arrays: take `weights` afresh for every step and keep
    no reference across a commit. Arrays are committed to the device (in JAX's sense) from the start, because a step
    compiled for uncommitted arrays would compile again after the first load.
    """

    def __init__(
        self,
        record_format: RecordFormat,
        capacities: Sequence[int],
        sharding: jax.sharding.SingleDeviceSharding | None = None,
        piece_bytes: int = PIECE_BYTES,
    ):
        self.record_format = record_format
        self.rounds = Rounds(record_format, piece_bytes)
        """How records are cut. Those that are not are written by `commit`, others piece by piece by `write`."""
        self.capacities = tuple(capacities)
        self.sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self._weights = [self._empty(capacity) for capacity in capacities]
        self.compile_commits()

    @property
    def weights(self) -> tuple[ExpertWeights, ...]:
        """The arrays of every MoE layer, valid until the next commit or resize of the layer."""
        return tuple(self._weights)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots on the device, empty ones included."""
        return sum(self.capacities) * self.record_format.nbytes

    def stage(self, record: np.ndarray | jax.Array) -> Num[Array, " numbers"]:
        """Start the transfer of one record, or a piece of one, to the device. Any thread may call it.

        On CPU the result aliases an aligned numpy record: the record must never be written again.
        """
        return jax.device_put(record, self.sharding)

    def stage_records(self, records: Sequence[np.ndarray | jax.Array]) -> list[Num[Array, " numbers"]]:
        """`stage` of several whole records in one call, which costs little more than that of one.

        None is made for records that are arrays of the device already.
        """
        staged = [record for record in records if isinstance(record, jax.Array) and record.sharding == self.sharding]
        return staged if len(staged) == len(records) else jax.device_put(list(records), self.sharding)

    def stage_round(self, record: HostRecord, number: int) -> tuple[Num[Array, " numbers"], ...]:
        """Transfer what a round has of a record: its pieces, or all of a record that is not cut. Waits for it."""
        staged = tuple(self.stage(part) for part in self.rounds.of(number, record))
        for array in staged:
            array.block_until_ready()
        return staged

    def commit(self, layer: int, staged: Sequence[Num[Array, " numbers"]], slots: Sequence[int]) -> None:
        """Write staged records into slots of a layer, in place and without waiting for the device.

        Only the owner of the step may call it, between steps. Replaces `weights[layer]`. Raises `ValueError` for
        duplicate slots and `IndexError` out of range, before anything is written.
        """
        if len(staged) != len(slots):
            raise ValueError(f"{len(staged)} records for {len(slots)} slots")
        if len(set(slots)) != len(slots):
            raise ValueError(f"slots {list(slots)} of layer {layer} are not distinct")
        for slot in slots:
            if not 0 <= slot < self.capacities[layer]:
                raise IndexError(f"slot {slot} of layer {layer} is not one of {self.capacities[layer]}")
        done = 0
        while (left := len(slots) - done) > 0:
            size = next(size for size in COMMIT_SIZES if size <= left)
            if size < min(left, COMMIT_SIZES[0]) and self.record_format.nbytes < _PADDED_BELOW:
                size *= 2
            part, filler = slice(done, done + size), max(0, size - left)
            records = (*staged[part], *(staged[-1],) * filler)  # the last one is written again
            at = np.asarray([*slots[part], *(slots[-1],) * filler], np.int32)
            self._weights[layer] = commit_experts(self._weights[layer], records, at)
            done += size

    def write(self, layer: int, slot: int, pieces: Sequence[Piece], staged: Sequence[Num[Array, " numbers"]]) -> None:
        """Write staged pieces of an expert into a slot, in place and without waiting for the device.

        As `commit`, for the owner of the step. Until all pieces are there the slot holds no expert. Raises `IndexError`
        for a slot out of range, before anything is written.
        """
        if not 0 <= slot < self.capacities[layer]:
            raise IndexError(f"slot {slot} of layer {layer} is not one of {self.capacities[layer]}")
        for piece, array in zip(pieces, staged, strict=True):
            name = self.record_format.arrays[piece.part].name
            whole = getattr(self._weights[layer], name)
            written = write_piece(whole, array, np.int32(slot), np.int32(piece.row))
            self._weights[layer] = dataclasses.replace(self._weights[layer], **{name: written})

    def resize(self, layer: int, capacity: int, slots: Sequence[int]) -> None:
        """Give a layer `capacity` slots, the first of which take over the weights of these `slots`, in order.

        Only the owner of the step may call it, while no step is in flight. Until it is done, both the old and the new
        arrays are there; nothing changes when there is no room for that.
        """
        old = self._weights[layer]
        chosen = np.zeros(min(capacity, old.capacity), np.int32)
        chosen[: len(slots)] = slots
        new = copy_experts(self._empty(capacity), old, chosen, np.int32(len(slots)))
        self._weights[layer] = jax.block_until_ready(new)
        self.capacities = (*self.capacities[:layer], capacity, *self.capacities[layer + 1 :])
        for array in jax.tree.leaves(old):
            array.delete()

    def is_lost(self, layer: int) -> bool:
        """Whether the arrays of a layer are gone: donated to a commit that failed, or never computed. Blocks."""
        try:
            self.block_until_ready(layer)
        except RuntimeError:  # JAX's own errors derive from it
            return True
        return False

    def rebuild(self, layer: int) -> None:
        """New arrays for a layer that lost its own. No slot holds an expert then."""
        for array in jax.tree.leaves(self._weights[layer]):
            if not array.is_deleted():
                array.delete()
        self._weights[layer] = self._empty(self.capacities[layer])

    def block_until_ready(self, layer: int) -> None:
        """Wait for the commits to a layer; the staged records are free afterwards."""
        jax.block_until_ready(self._weights[layer])

    def compile_commits(self) -> None:
        """Run every commit size once, or the write of a piece of each part, writing to slot 0 what is in it. For the
        owner of the step."""
        for layer in {capacity: layer for layer, capacity in enumerate(self.capacities)}.values():
            if self.rounds.pieces:
                self._compile_writes(layer)
                continue
            record = aligned_record(self.record_format)
            for part, array in zip(
                self.record_format.views(record), jax.tree.leaves(self._weights[layer]), strict=True
            ):
                part[:] = array[0]
            staged = self.stage(record)
            for size in COMMIT_SIZES:
                first = np.zeros(size, np.int32)
                self._weights[layer] = commit_experts(self._weights[layer], (staged,) * size, first)
            self.block_until_ready(layer)

    def _compile_writes(self, layer: int) -> None:
        """Write the first piece of each part of what is in slot 0."""
        for piece in (piece for piece in self.rounds.pieces if piece.row == 0):
            array = getattr(self._weights[layer], self.record_format.arrays[piece.part].name)
            rows = np.asarray(array[0, : piece.rows]).ravel()
            self.write(layer, 0, [piece], [self.stage(rows.view(self.record_format.dtype))])
        self.block_until_ready(layer)

    def _empty(self, capacity: int) -> ExpertWeights:
        weights = jax.device_put(self.record_format.empty_weights(capacity), self.sharding)
        for array in jax.tree.leaves(weights):
            use_huge_pages(array)
        return weights
