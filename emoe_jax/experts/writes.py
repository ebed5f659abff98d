"""The writes of one commit, which keep slot table and slab in step."""

from collections import defaultdict

import jax

from emoe_jax.experts.slab import ExpertSlab
from emoe_jax.experts.table import SlotTable
from emoe_jax.experts.tickets import LoadTicket


class Writes:
    """Assignments of one commit: the table at once, so that the next choice sees them, the slab in one go per layer."""

    def __init__(self, table: SlotTable):
        self.tickets: list[LoadTicket] = []
        self._table = table
        self._pending: dict[int, dict[int, jax.Array]] = defaultdict(dict)  # layer -> slot -> record
        self._evicted: dict[int, list[int]] = defaultdict(list)

    def add(self, ticket: LoadTicket, slot: int) -> None:
        """Give a staged expert a slot in the table now. Its weights are written by `flush`.

        A later ticket for the same slot replaces this one. Raises as `SlotTable.assign` does.
        """
        assert ticket.staged is not None
        evicted = self._table.assign(ticket.layer, slot, ticket.expert)
        if evicted is not None:
            self._evicted[ticket.layer].append(evicted)
        self.tickets.append(ticket)
        self._pending[ticket.layer][slot] = ticket.staged  # replaces an expert that was evicted again right away

    def flush(self, slab: ExpertSlab) -> None:
        """Commit what was added, layer by layer. After an error, `abandon` knows the layers that were not written."""
        for layer in list(self._pending):
            slots = self._pending[layer]
            slab.commit(layer, list(slots.values()), list(slots))
            del self._pending[layer]

    def abandon(self) -> dict[int, list[int]]:
        """Empty the slots whose weights were not written. By layer, the experts that were to make room."""
        for layer, slots in self._pending.items():
            for slot in slots:
                self._table.release(layer, slot)
        return {layer: self._evicted[layer] for layer in self._pending}
