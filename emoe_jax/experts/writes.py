"""The writes of one commit, which keep slot table and slab in step."""

from collections import defaultdict

from emoe_jax.experts.slab import ExpertSlab
from emoe_jax.experts.table import SlotTable
from emoe_jax.experts.tickets import LoadTicket


class Writes:
    """Assignments of one commit: the table at once, so that the next choice sees them, the slab in one go per layer."""

    def __init__(self, table: SlotTable):
        self.tickets: list[LoadTicket] = []
        """Those whose experts are whole with this commit."""
        self.unfinished: list[LoadTicket] = []
        """Those of which more rounds are to come."""
        self._table = table
        self._pending: dict[int, dict[int, LoadTicket]] = defaultdict(dict)  # layer -> slot -> what is staged for it
        self._evicted: dict[int, list[int]] = defaultdict(list)

    def add(self, ticket: LoadTicket, slot: int) -> None:
        """Give a staged expert a slot in the table now. Its weights are written by `flush`.

        Where more of the expert is to come, the slot is reserved for it and holds none until then. A later ticket for
        the same slot replaces this one. Raises as `SlotTable.assign` does.
        """
        assert ticket.staged is not None
        if ticket.is_last_round:
            evicted = self._table.assign(ticket.layer, slot, ticket.expert)
            self.tickets.append(ticket)
        else:
            evicted = None if ticket.slot == slot else self._table.reserve(ticket.layer, slot)
            self.unfinished.append(ticket)
        if evicted is not None:
            ticket.evicted = evicted
        if ticket.evicted is not None:
            self._evicted[ticket.layer].append(ticket.evicted)
        ticket.slot = slot
        self._pending[ticket.layer][slot] = ticket  # replaces an expert that was evicted again right away

    def flush(self, slab: ExpertSlab) -> None:
        """Commit what was added, layer by layer. After an error, `abandon` knows the layers that were not written."""
        for layer in list(self._pending):
            pending = self._pending[layer]
            if slab.rounds.pieces:
                for slot, ticket in pending.items():
                    assert ticket.staged is not None
                    slab.write(layer, slot, slab.rounds[ticket.round], ticket.staged)
            else:
                records = [ticket.staged[0] for ticket in pending.values() if ticket.staged is not None]
                slab.commit(layer, records, list(pending))
            del self._pending[layer]

    def abandon(self) -> dict[int, list[int]]:
        """Empty the slots whose weights were not written. By layer, the experts that were to make room."""
        for layer, slots in self._pending.items():
            for slot in slots:
                self._table.release(layer, slot)
        return {layer: self._evicted[layer] for layer in self._pending}
