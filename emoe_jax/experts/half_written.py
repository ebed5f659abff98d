"""Experts of which some rounds are in their slots, and others are still to come."""

from collections.abc import Callable, Sequence

from emoe_jax.experts.table import SlotTable
from emoe_jax.experts.tickets import LoadState, LoadTicket, TicketQueue
from emoe_jax.experts.writes import Writes

_OVER = (LoadState.FAILED, LoadState.CANCELLED, LoadState.STALE)


class HalfWritten:
    """Tickets whose slot is reserved, for the owner of the step alone. No step reads such a slot: the table says that
    it holds no expert. `lost` is called with the layer and the expert that had made room for one that does not come.
    """

    def __init__(self, table: SlotTable, queue: TicketQueue, lost: Callable[[int, int], None]):
        self._table, self._queue, self._lost = table, queue, lost
        self._tickets: dict[LoadTicket, None] = {}

    def go_on(self, tickets: list[LoadTicket]) -> None:
        """A round of each was written: have the next one staged."""
        for ticket in tickets:
            self._tickets[ticket] = None
            self._queue.go_on(ticket)

    def finished(self, tickets: list[LoadTicket]) -> None:
        """These experts are whole, and the table has them."""
        for ticket in tickets:
            self._tickets.pop(ticket, None)

    def failed(self, writes: Writes) -> None:
        """A commit failed, and its tickets are over: keep only what of it is whole."""
        self._tickets |= dict.fromkeys(writes.unfinished)
        self.finished([ticket for ticket in writes.tickets if ticket.state is LoadState.COMMITTED])
        self.sweep()

    @property
    def has_over(self) -> bool:
        """Whether `sweep` would find a ticket."""
        return any(ticket.state in _OVER for ticket in self._tickets)

    def sweep(self) -> None:
        """Empty the slots of tickets that failed or were given up."""
        for ticket in [ticket for ticket in self._tickets if ticket.state in _OVER]:
            self._release(ticket)

    def slot(self, layer: int, expert: int) -> int | None:
        """Where the expert is being written, or None."""
        found = (ticket for ticket in self._tickets if (ticket.layer, ticket.expert) == (layer, expert))
        ticket = next(found, None)
        return None if ticket is None else ticket.slot

    def drop(self, layer: int, but: Sequence[int] = ()) -> None:
        """Give up the experts of a layer that are written in part, and empty their slots. Those of `but` go on."""
        for ticket in list(self._tickets):
            # A commit that is under way says itself what becomes of its tickets.
            if ticket.layer == layer and ticket.expert not in but and ticket.state is not LoadState.COMMITTING:
                self._queue.finish(ticket, LoadState.STALE)
                self._release(ticket)

    def _release(self, ticket: LoadTicket) -> None:
        del self._tickets[ticket]
        assert ticket.slot is not None
        self._table.release(ticket.layer, ticket.slot)
        if ticket.evicted is not None:
            self._lost(ticket.layer, ticket.evicted)
