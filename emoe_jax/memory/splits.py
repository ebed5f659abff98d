"""How slab and KV cache may share the device, and the way from one split to another within the plan: arithmetic."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple


class MemorySplit(NamedTuple):
    """Slots per MoE layer and KV pages, the trash page included."""

    capacities: tuple[int, ...]
    num_pages: int


class Sizes(NamedTuple):
    """Bytes of one expert slot and of one KV page in one layer, and how many layers have pages."""

    slot: int
    layer_page: int
    num_layers: int

    @property
    def page(self) -> int:
        """Bytes of a page over all layers."""
        return self.layer_page * self.num_layers

    def of(self, split: MemorySplit) -> int:
        """Bytes that slab and KV cache take together under this split."""
        return sum(split.capacities) * self.slot + split.num_pages * self.page


class Change(NamedTuple):
    """One layer's slots, or its KV pages, become more or fewer: the new arrays are there before the old ones go."""

    what: Literal["slots", "pages"]
    layer: int
    before: int
    after: int


def changes(before: MemorySplit, after: MemorySplit, num_layers: int) -> Iterator[Change]:
    """From one split to another, a layer at a time; what shrinks comes first, to make room for what grows."""
    capacities = enumerate(zip(before.capacities, after.capacities, strict=True))
    slots = [Change("slots", layer, old, new) for layer, (old, new) in capacities]
    pages = [Change("pages", layer, before.num_pages, after.num_pages) for layer in range(num_layers)]
    yield from (change for change in slots + pages if change.after < change.before)
    yield from (change for change in slots + pages if change.after > change.before)


def peak_bytes(before: MemorySplit, after: MemorySplit, sizes: Sizes) -> int:
    """The most that slab and KV cache take together on the way from one split to another."""
    held = peak = sizes.of(before)
    for what, _, old, new in changes(before, after, sizes.num_layers):
        unit = sizes.slot if what == "slots" else sizes.layer_page
        peak = max(peak, held + new * unit)
        held += (new - old) * unit
    return peak


def trade_bytes(planned: MemorySplit, lean: MemorySplit, sizes: Sizes) -> int:
    """What trades between the two splits take for a moment, beyond the planned one."""
    return max(peak_bytes(planned, lean, sizes), peak_bytes(lean, planned, sizes)) - sizes.of(planned)


def lean_capacities(capacities: Sequence[int], given_up: int, top_k: int) -> tuple[int, ...]:
    """So many slots fewer in every layer, but at least half of them and top-k."""
    return tuple(max(top_k, -(-slots // 2), slots - given_up) for slots in capacities)


def lean_split(planned: MemorySplit, sizes: Sizes, wanted_pages: int, top_k: int) -> MemorySplit | None:
    """Fewer slots and more pages within the same bytes: as many as are wanted, or as `lean_capacities` can free.

    None when the planned split has all the pages that are wanted, or has no slots to give.
    """
    for given_up in range(1, max(planned.capacities) + 1):
        capacities = lean_capacities(planned.capacities, given_up, top_k)
        freed = (sum(planned.capacities) - sum(capacities)) * sizes.slot
        pages = min(wanted_pages, planned.num_pages + freed // sizes.page)
        if pages == wanted_pages or given_up == max(planned.capacities):
            return MemorySplit(capacities, pages) if pages > planned.num_pages else None
    return None


def trading(
    planned: MemorySplit, sizes: Sizes, wanted_pages: int, fewest_pages: int, top_k: int, room: int, step_bytes: int
) -> tuple[MemorySplit, MemorySplit | None, int]:
    """The planned split, its lean one, and the bytes that both steps and trades need beside them, all within `room`.

    What a trade takes for a moment may have to come out of the planned pages, down to `fewest_pages`. Where that, or
    the lean split, brings no more pages than were planned at first, nothing is changed and there is no lean split.
    """
    split = planned
    while split.num_pages >= fewest_pages:
        lean = lean_split(split, sizes, wanted_pages, top_k)
        if lean is None or lean.num_pages <= planned.num_pages:
            break
        beside = max(step_bytes, trade_bytes(split, lean, sizes))
        excess = sizes.of(split) + beside - room
        if excess <= 0:
            return split, lean, beside
        split = split._replace(num_pages=split.num_pages - -(-excess // sizes.page))
    return planned, None, step_bytes
