"""The fixed-capacity home of the resident experts on the device."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from emoe_jax.experts.huge_pages import use_huge_pages
from emoe_jax.experts.store import HostRecord, aligned_record
from emoe_jax.experts.weights import ExpertLayout, ExpertWeights

# One compiled commit per size. A batch is cut into these, largest first, because a padded entry would cost a full copy.
COMMIT_SIZES = (8, 4, 2, 1)


@functools.partial(jax.jit, donate_argnames=("weights",))
def commit_experts(
    weights: ExpertWeights, staged: tuple[Float[Array, " numbers"], ...], slots: Int32[Array, " n"]
) -> ExpertWeights:
    """Write staged records into slots of one layer, in place. Donates `weights`.

    Records are taken whole and cut here, so that staging is one transfer per expert and this is one copy. Slots must be
    below C: a scatter with `mode="drop"` would skip others, but reads the old weights of every slot it writes.
    """
    w_in, w_out = weights.w_in, weights.w_out
    in_shape, out_shape = w_in.shape[1:], w_out.shape[1:]
    split = in_shape[0] * in_shape[1]
    for index, record in enumerate(staged):
        slot = slots[index]
        w_in = jax.lax.dynamic_update_index_in_dim(w_in, record[:split].reshape(in_shape), slot, axis=0)
        w_out = jax.lax.dynamic_update_index_in_dim(w_out, record[split:].reshape(out_shape), slot, axis=0)
    return ExpertWeights(w_in, w_out)


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
        self, layout: ExpertLayout, capacities: Sequence[int], sharding: jax.sharding.SingleDeviceSharding | None = None
    ):
        self.layout = layout
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
        return sum(self.capacities) * self.layout.nbytes

    def stage(self, record: HostRecord) -> Float[Array, " numbers"]:
        """Start the transfer of one record to the device. Any thread may call it.

        On CPU the result aliases an aligned numpy record: the record must never be written again.
        """
        return jax.device_put(record, self.sharding)

    def commit(self, layer: int, staged: Sequence[Float[Array, " numbers"]], slots: Sequence[int]) -> None:
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
        for size in COMMIT_SIZES:
            while len(slots) - done >= size:
                part = slice(done, done + size)
                self._weights[layer] = commit_experts(
                    self._weights[layer], tuple(staged[part]), np.asarray(slots[part], np.int32)
                )
                done += size

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
        weights = self._weights[layer]
        weights.w_in.block_until_ready()
        weights.w_out.block_until_ready()

    def compile_commits(self) -> None:
        """Run every commit size once, writing to slot 0 what is in it. For the owner of the step."""
        for layer in {capacity: layer for layer, capacity in enumerate(self.capacities)}.values():
            record = aligned_record(self.layout)
            for part, array in zip(self.layout.views(record), jax.tree.leaves(self._weights[layer]), strict=True):
                part[:] = array[0]
            staged = self.stage(record)
            for size in COMMIT_SIZES:
                first = np.zeros(size, np.int32)
                self._weights[layer] = commit_experts(self._weights[layer], (staged,) * size, first)
            self.block_until_ready(layer)

    def _empty(self, capacity: int) -> ExpertWeights:
        weights = jax.device_put(self.layout.empty_weights(capacity), self.sharding)
        for array in jax.tree.leaves(weights):
            use_huge_pages(array)
        return weights
