"""Where the experts that a step waits for go."""

from collections.abc import Iterable

from emoe_jax.errors import CapacityError
from emoe_jax.experts.half_written import HalfWritten
from emoe_jax.experts.table import SlotTable

Place = tuple[int, int, int]
"""Layer, expert and slot."""


def places_for(
    layer: int, experts: Iterable[int], evictable: Iterable[int], table: SlotTable, half_written: HalfWritten
) -> list[Place]:
    """A slot for each of these experts that is missing: an empty one, or that of the next `evictable` expert that is
    resident and not wanted. An expert that is written in part goes on where it was begun.

    Raises `CapacityError` where that is not enough, and `IndexError` for an expert that there is not.
    """
    wanted = sorted(set(map(int, experts)))
    for expert in wanted:
        table.check_expert(layer, expert)
    slot_of, capacity = table.slot_of_expert[layer].tolist(), table.capacities[layer]
    missing = [expert for expert in wanted if slot_of[expert] == capacity]
    if not missing:
        return []
    half_written.sweep()
    begun = {expert: slot for expert in missing if (slot := half_written.slot(layer, expert)) is not None}
    others = dict.fromkeys(map(int, evictable))
    evicted = [slot_of[expert] for expert in others if slot_of[expert] < capacity and expert not in wanted]
    slots = [*table.empty_slots(layer), *evicted]
    if len(slots) < len(missing) - len(begun):
        half_written.drop(layer, but=missing)  # the places of others are needed now
        slots = [*table.empty_slots(layer), *evicted]
    if len(slots) < len(missing) - len(begun):
        raise CapacityError(
            f"layer {layer} must load {len(missing)} experts, but only {len(slots)} of its "
            f"{capacity} slots are empty or may be replaced"
        )
    free = iter(slots)
    return [(layer, expert, begun[expert] if expert in begun else next(free)) for expert in missing]
