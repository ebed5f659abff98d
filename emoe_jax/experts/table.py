"""Which expert is in which slot: the host's truth about the slab."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Int32

EMPTY = -1


class SlotTable:
    """Slots of every MoE layer. Only the owner of the step changes it, and only together with the slab.

    `slot_of_expert[m, e]` is the slot of expert `e` in layer `m`, or that layer's capacity when it is absent, so that
    gathers and scatters with `mode="drop"` skip it (an index of -1 would wrap).
    """

    def __init__(self, capacities: Sequence[int], num_experts: int, *, sharding: jax.sharding.Sharding | None = None):
        if any(not 1 <= capacity <= num_experts for capacity in capacities):
            raise ValueError(
                f"capacities {list(capacities)} must lie between 1 and the {num_experts} experts of a layer"
            )
        self.capacities = tuple(int(capacity) for capacity in capacities)
        self.num_experts = num_experts
        self._sharding = sharding
        self._absent = np.asarray(self.capacities, np.int32)[:, None]  # [M, 1]
        self._slot_of_expert = np.repeat(self._absent, num_experts, axis=1)  # [M, E]
        self._expert_of_slot = [np.full(capacity, EMPTY, np.int32) for capacity in self.capacities]
        self._reserved: set[tuple[int, int]] = set()  # layer and slot
        self._on_device: Array | None = None
        self._resident_mask: Bool[np.ndarray, "M E"] | None = None

    @property
    def num_layers(self) -> int:
        """`M`: MoE layers only."""
        return len(self.capacities)

    @property
    def slot_of_expert(self) -> Int32[np.ndarray, "M E"]:
        """A read-only view that follows later changes."""
        return _read_only(self._slot_of_expert)

    @property
    def resident_mask(self) -> Bool[np.ndarray, "M E"]:
        """Read-only, and as it is now: later changes make another array. The same array until the next change."""
        mask = self._resident_mask
        if mask is None:
            mask = self._resident_mask = self._slot_of_expert < self._absent
            mask.flags.writeable = False
        return mask

    def expert_of_slot(self, layer: int) -> Int32[np.ndarray, " C"]:
        """Expert in each slot of the layer, -1 where empty. A read-only view that follows later changes."""
        return _read_only(self._expert_of_slot[layer])

    def resident(self, layer: int) -> Int32[np.ndarray, " n"]:
        """Experts in the layer's slots, ascending."""
        experts = self._expert_of_slot[layer]
        return np.sort(experts[experts != EMPTY])

    def is_resident(self, layer: int, expert: int) -> bool:
        """Whether the expert has a slot. `layer` counts MoE layers. Raises `IndexError` for an unknown expert."""
        return self.slot(layer, expert) < self.capacities[layer]

    def slot(self, layer: int, expert: int) -> int:
        """The expert's slot, or the layer's capacity when it is absent."""
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert {expert} is not one of {self.num_experts}")
        return int(self._slot_of_expert[layer, expert])

    def check_expert(self, layer: int, expert: int) -> None:
        """Raises `IndexError` for an expert or a layer that there is not."""
        if not (0 <= layer < self.num_layers and 0 <= expert < self.num_experts):
            raise IndexError(
                f"no expert {expert} in layer {layer}: the model has {self.num_layers} MoE layers "
                f"of {self.num_experts} experts"
            )

    def empty_slots(self, layer: int) -> list[int]:
        """The slots of a layer that hold no expert and are not reserved for one, lowest first."""
        slots = np.flatnonzero(self._expert_of_slot[layer] == EMPTY).tolist()
        return [slot for slot in slots if (layer, slot) not in self._reserved] if self._reserved else slots

    def reserve(self, layer: int, slot: int) -> int | None:
        """Have a slot hold no expert until one is assigned to it: its weights are being replaced piece by piece.

        Returns the expert that was there, or None. Raises `ValueError` for a reserved slot.
        """
        self._check_slot(layer, slot)
        if (layer, slot) in self._reserved:
            raise ValueError(f"slot {slot} of layer {layer} is reserved already")
        evicted = int(self._expert_of_slot[layer][slot])
        self.release(layer, slot)
        self._reserved.add((layer, slot))
        return None if evicted == EMPTY else evicted

    def assign(self, layer: int, slot: int, expert: int) -> int | None:
        """Record that `slot` now holds `expert`; returns the expert that was there, or None.

        Raises `ValueError` for a resident expert and `IndexError` out of range, and changes nothing then.
        """
        self._check_slot(layer, slot)
        if self.is_resident(layer, expert):
            raise ValueError(
                f"expert {expert} of layer {layer} is already in slot {self.slot(layer, expert)}; "
                f"slot {slot} would hold a duplicate"
            )
        evicted = int(self._expert_of_slot[layer][slot])
        if evicted != EMPTY:
            self._slot_of_expert[layer, evicted] = self.capacities[layer]
        self._reserved.discard((layer, slot))
        self._expert_of_slot[layer][slot] = expert
        self._slot_of_expert[layer, expert] = slot
        self._changed()
        return None if evicted == EMPTY else evicted

    def release(self, layer: int, slot: int) -> None:
        """Forget the slot's expert, or for which one it is reserved, when its weights can no longer be trusted."""
        self._check_slot(layer, slot)
        self._reserved.discard((layer, slot))
        expert = int(self._expert_of_slot[layer][slot])
        if expert != EMPTY:
            self._slot_of_expert[layer, expert] = self.capacities[layer]
            self._expert_of_slot[layer][slot] = EMPTY
            self._changed()

    def resize(self, layer: int, capacity: int, experts: Sequence[int]) -> None:
        """Give a layer `capacity` slots, the first of which hold these `experts`, in order, and the others none.

        Raises `ValueError` for experts that do not fit or come twice.
        """
        if not 1 <= capacity <= self.num_experts or len(experts) > capacity or len(set(experts)) < len(experts):
            raise ValueError(f"{capacity} slots of layer {layer} for experts {list(experts)} of {self.num_experts}")
        self.capacities = (*self.capacities[:layer], capacity, *self.capacities[layer + 1 :])
        self._reserved = {(other, slot) for other, slot in self._reserved if other != layer}
        self._absent[layer] = capacity
        self._slot_of_expert[layer] = capacity
        self._slot_of_expert[layer, list(experts)] = np.arange(len(experts))
        self._expert_of_slot[layer] = np.full(capacity, EMPTY, np.int32)
        self._expert_of_slot[layer][: len(experts)] = experts
        self._changed()

    def device_table(self) -> Int32[Array, "M E"]:
        """`slot_of_expert` on the device; transferred only after a change, the same array otherwise."""
        table = self._on_device
        if table is None:
            # A copy, because device_put on CPU may alias the source and this table goes on changing.
            table = self._on_device = jax.device_put(self._slot_of_expert.copy(), self._sharding)
        return table

    def _changed(self) -> None:
        self._on_device = self._resident_mask = None

    def _check_slot(self, layer: int, slot: int) -> None:
        if not 0 <= slot < self.capacities[layer]:
            raise IndexError(f"slot {slot} of layer {layer} is not one of {self.capacities[layer]}")


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view
