"""Loads ahead within a step: experts that the next layer is expected to need, staged while this one computes."""

import dataclasses
from collections import Counter

import numpy as np
from jaxtyping import Int

from emoe_jax.experts.loader import ExpertLoader
from emoe_jax.experts.table import SlotTable
from emoe_jax.experts.tickets import LoadState, LoadTicket

PRIORITY = 1e30
"""Of a load ahead: before all that a policy asks for between steps, behind what a step waits for."""


@dataclasses.dataclass(frozen=True)
class AheadStats:
    """Totals of the layers that stopped at their routers, in lookups: an expert counts once per step and layer.

    `asked` is the sum of `spared`, `late`, `useless` and `withdrawn`, but for what is still under way.
    """

    misses: int = 0
    """Experts that a layer wished for and did not have when it was reached."""
    asked: int = 0
    """Experts that were asked for before their layer was reached."""
    spared: int = 0
    """Misses that were staged by then, so that no step waited for them to be moved."""
    late: int = 0
    """Misses that had been asked for, and were not staged yet."""
    useless: int = 0
    """Experts that were moved, or being moved, and that their layer did not wish for."""
    withdrawn: int = 0
    """Experts that nothing had been moved of when their layer turned out not to wish for them."""


class LoadsAhead:
    """`expect` what the next layer will wish for, then `arrive` there. For the owner of the step alone.

    What was staged takes a slot only when its layer wishes for it, by `ExpertLoader.load_now`. A wrong guess costs the
    transfer: it evicts nothing, and no layer computes with it.
    """

    def __init__(self, loader: ExpertLoader, table: SlotTable):
        self._totals: Counter[str] = Counter()  # fields of AheadStats
        self._loader = loader
        self._table = table
        self._tickets: dict[int, dict[int, LoadTicket]] = {}  # layer -> expert -> ticket

    @property
    def stats(self) -> AheadStats:
        """A copy of the totals since the start."""
        return AheadStats(**self._totals)

    def expect(self, layer: int, counts: Int[np.ndarray, " E"]) -> None:
        """A layer is expected to wish for the experts whose count is above 0: have the absent ones staged."""
        asked = self._tickets.setdefault(layer, {})
        for expert in np.flatnonzero((counts > 0) & ~self._table.resident_mask[layer]).tolist():
            if expert not in asked or not asked[expert].is_active:  # not that of a step that failed
                asked[expert] = self._loader.request(layer, expert, PRIORITY)
                self._totals.update(asked=1)

    def arrive(self, layer: int, needed: Int[np.ndarray, " n"]) -> None:
        """A layer is reached and wishes for these experts: give up the others that were asked for."""
        absent = set(needed[~self._table.resident_mask[layer, needed]].tolist())
        self._totals.update(misses=len(absent))
        for expert, ticket in self._tickets.pop(layer, {}).items():
            staged = ticket.state is LoadState.READY and ticket.is_last_round
            if expert in absent:
                self._totals.update(spared=int(staged), late=int(not staged))
                continue
            moved = ticket.state in (LoadState.READY, LoadState.STAGING)
            self._totals.update(useless=int(moved), withdrawn=int(not moved))
            if ticket.evict is None:  # others are the policy's, which asked for the expert before
                self._loader.cancel(ticket)
