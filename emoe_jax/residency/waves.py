"""The way through a layer that stops at its router: the experts that are used, a slab-full at a time."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Int, Int32

from emoe_jax.experts.loader import ExpertLoader
from emoe_jax.experts.table import SlotTable
from emoe_jax.residency.ahead import LoadsAhead

EvictionOrder = Callable[[int], Iterable[int]]
"""Experts of a layer, the one to give up first in front."""


class WaveLoader:
    """Cuts the experts that a layer's rows use into waves that fit its slots, and loads what each one misses.

    Waves are in ascending order of expert, as the MoE op adds contributions, so a result does not depend on how many
    waves it took. A wave ends where the next expert would take the slot of one that is still to be used: so each absent
    expert is loaded once. Where all slots hold such experts, the one to be used last makes room.

    Worked example: 3 slots hold experts 5, 6 and 9; experts 1, 4, 5, 7 are used. Expert 6 makes room for 1, and 9 for
    4: the first wave is {1, 4, 5}, the second {7}.
    """

    def __init__(
        self,
        loader: ExpertLoader,
        table: SlotTable,
        eviction_order: EvictionOrder,
        ahead: LoadsAhead | None = None,
    ):
        self.ahead = ahead
        """What is told of the layer to come; None where the policy does not look ahead."""
        self._loader = loader
        self._table = table
        self._eviction_order = eviction_order

    def waves(self, layer: int, used: Int[np.ndarray, " E"]) -> Iterator[Int32[np.ndarray, " E"]]:
        """Yield the waves of a layer as their experts are there: the slots of these, and the capacity `C` for all other
        experts. `used` counts rows.

        Raises what the store raised when an expert cannot be read. At least one wave, possibly empty, comes.
        """
        needed = np.flatnonzero(used)
        if self.ahead is not None:
            self.ahead.arrive(layer, needed)
        first = 0
        while first < max(len(needed), 1):
            wave = needed[first : first + self._length(layer, needed[first:])]
            first += max(len(wave), 1)
            if not self._table.resident_mask[layer, wave].all():
                self.load(layer, wave, needed[first:])
            slots = np.full(self._table.num_experts, self._table.capacities[layer], np.int32)
            slots[wave] = self._table.slot_of_expert[layer, wave]
            yield slots

    def load(self, layer: int, wave: Int[np.ndarray, " n"], later: Int[np.ndarray, " others"]) -> None:
        """Have the experts of a wave on the device. Those of `later` waves make room last."""
        places = {expert: place for place, expert in enumerate(later.tolist(), 1)}
        # Stable: experts that are used no more go first, then the one to be used last.
        order = self._eviction_order(layer)
        if places:
            order = sorted(order, key=lambda expert: -places.get(expert, len(places) + 1))
        self._loader.load_now(layer, wave.tolist(), order)

    def _length(self, layer: int, needed: Int[np.ndarray, " n"]) -> int:
        """How many of the experts still to be used are in the next wave."""
        capacity = self._table.capacities[layer]
        if len(needed) <= capacity:
            return len(needed)
        resident = self._table.resident_mask[layer, needed]
        room = max(1, capacity - int(resident.sum()))
        beyond = np.flatnonzero(np.cumsum(~resident) > room)
        return min(int(beyond[0]) if len(beyond) else len(needed), capacity)
