"""Waves of a layer: every used expert once, in order, and each absent one loaded once."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from emoe_jax.experts.table import SlotTable
from emoe_jax.residency.waves import WaveLoader

EXPERTS = 12


class Loads:
    """In place of the loader: what it was asked for goes into the table at once."""

    def __init__(self, table: SlotTable):
        self.table, self.loaded = table, 0

    def load_now(self, layer: int, experts: Sequence[int], evictable: Sequence[int]) -> int:
        missing = [expert for expert in experts if not self.table.is_resident(layer, expert)]
        others = (each for each in evictable if each not in experts and self.table.is_resident(layer, each))
        empty = list(self.table.empty_slots(layer))
        for expert in missing:
            slot = empty.pop() if empty else self.table.slot(layer, next(others))
            self.table.assign(layer, slot, expert)
        self.loaded += len(missing)
        return len(missing)


def waves_of(resident: list[int], used: set[int], capacity: int) -> tuple[list[list[int]], int, SlotTable]:
    table = SlotTable([capacity], EXPERTS)
    for slot, expert in enumerate(resident):
        table.assign(0, slot, expert)
    loads = Loads(table)
    waves = WaveLoader(cast(Any, loads), table, lambda _: range(EXPERTS))
    counts = np.isin(np.arange(EXPERTS), list(used)).astype(int)
    found = []
    for slots in waves.waves(0, counts):
        wave = np.flatnonzero(slots < capacity).tolist()
        assert slots[wave].tolist() == [table.slot(0, expert) for expert in wave]
        found.append(wave)
    return found, loads.loaded, table


@given(st.integers(1, EXPERTS), st.permutations(range(EXPERTS)), st.sets(st.integers(0, EXPERTS - 1)))
def test_every_used_expert_is_in_one_wave_and_is_loaded_once(capacity: int, order: list[int], used: set[int]) -> None:
    resident = order[:capacity]
    waves, loads, _ = waves_of(resident, used, capacity)
    assert [expert for wave in waves for expert in wave] == sorted(used)
    absent = used - set(resident)
    if set(resident) <= used and absent:  # each slot holds one that is still to be used: some have to come back
        assert loads >= len(absent)
    else:
        assert loads == len(absent)


def test_the_example_of_the_docstring() -> None:
    waves, loads, _ = waves_of([5, 6, 9], {1, 4, 5, 7}, 3)
    assert waves == [[1, 4, 5], [7]]
    assert loads == 3


def test_where_all_are_still_to_be_used_the_last_one_makes_room() -> None:
    waves, loads, _ = waves_of([5, 6, 9], {0, 5, 6, 9}, 3)
    assert waves == [[0, 5, 6], [9]]
    assert loads == 2
