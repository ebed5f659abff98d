"""A reader, store, slab, slot table and loader that work together."""

from typing import Any

import numpy as np

from emoe_jax.experts.loader import ExpertLoader
from emoe_jax.experts.slab import ExpertSlab
from emoe_jax.experts.store import ExpertStore
from emoe_jax.experts.table import EMPTY, SlotTable
from tests.experts.fake_reader import RECORD_FORMAT, FakeReader, expected

NUM_EXPERTS = 8


class Rig:
    """`check` compares the slab with what the table says. `options` go to the loader."""

    def __init__(
        self,
        capacities: list[int],
        backoff: float = 0.001,
        piece_bytes: int = RECORD_FORMAT.nbytes,
        host_bytes: int = 0,
        **options: Any,
    ):
        self.reader = FakeReader()
        sizes = (len(capacities), NUM_EXPERTS, host_bytes)
        self.store = ExpertStore(self.reader, RECORD_FORMAT, *sizes, piece_bytes=piece_bytes)
        self.slab = ExpertSlab(RECORD_FORMAT, capacities, piece_bytes=piece_bytes)
        self.table = SlotTable(capacities, NUM_EXPERTS)
        self.loader = ExpertLoader(self.store, self.slab, self.table, backoff=backoff, **options)

    def check(self) -> None:
        for layer, weights in enumerate(self.slab.weights):
            w_in, w_out = np.asarray(weights.w_in), np.asarray(weights.w_out)
            for slot, expert in enumerate(self.table.expert_of_slot(layer)):
                if expert != EMPTY:
                    record = np.concatenate([w_in[slot].ravel(), w_out[slot].ravel()])
                    np.testing.assert_array_equal(record, expected(layer, int(expert)))

    def load(self, *pairs: tuple[int, int]) -> None:
        for layer, expert in pairs:
            self.loader.request(layer, expert)
        assert self.loader.wait_idle(10)
        assert len(self.loader.commit()) == len(pairs)
