"""The `exact` contract's way through a layer: the wished experts, a slab-full at a time."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Int

from emoe_jax.experts.loader import ExpertLoader
from emoe_jax.experts.table import SlotTable
from emoe_jax.residency.ahead import LoadsAhead

EvictionOrder = Callable[[int], Iterable[int]]
"""Experts of a layer, the one to give up first in front."""


class WaveLoader:
    """Cuts the experts that a layer's rows wish for into waves that fit its slots, and loads what each one misses.

    Waves are in ascending order of expert, as the MoE op adds contributions, so a result does not depend on how many
    waves it took. Worked example: 3 slots, wishes for experts 1, 4, 5, 7 -> waves {1, 4, 5} and {7}.
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

    def waves(self, layer: int, wish_counts: Int[np.ndarray, " E"]) -> Iterator[Int[np.ndarray, " E"]]:
        """Yield, per wave, the slot of each of its experts and the capacity `C` for all others.

        Raises what the store raised when an expert cannot be read. At least one wave, possibly empty, comes.
        """
        capacity = self._table.capacities[layer]
        needed = np.flatnonzero(wish_counts)
        if self.ahead is not None:
            self.ahead.arrive(layer, needed)
        for first in range(0, max(len(needed), 1), capacity):
            wave = needed[first : first + capacity]
            if not all(self._table.is_resident(layer, expert) for expert in wave):
                later = set(needed[first + capacity :].tolist())
                order = sorted(self._eviction_order(layer), key=later.__contains__)  # stable: unneeded ones go first
                self._loader.load_now(layer, wave.tolist(), order)
            slots = np.full(self._table.num_experts, capacity, np.int32)
            slots[wave] = self._table.slot_of_expert[layer, wave]
            yield slots
