"""Whatever happens in whatever order: every slot holds exactly the expert that the table names."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from jaxtyping import Array, Float, Int32

from emoe_jax.errors import CapacityError
from emoe_jax.experts.loader import ExpertLoader
from emoe_jax.experts.slab import ExpertSlab
from emoe_jax.experts.store import ExpertStore
from emoe_jax.experts.table import EMPTY, SlotTable
from emoe_jax.experts.tickets import LoadState, LoadTicket
from emoe_jax.experts.weights import ExpertWeights
from tests.experts.fake_reader import RECORD_FORMAT, FakeReader, expected

CAPACITIES = (3, 2)
NUM_EXPERTS = 6
layers = st.integers(0, len(CAPACITIES) - 1)
experts = st.integers(0, NUM_EXPERTS - 1)
# Where the choices there are depend on how far the worker threads got, take one modulo their number: what is drawn must
# not depend on timing.
choices = st.integers(0, 99)


@jax.jit
def read_slowly(weights: ExpertWeights, slots: Int32[Array, " E"]) -> Float[Array, "E P"]:
    """The record of each expert of a layer, zeros for an absent one. The loop keeps the device busy first."""
    delay = jax.lax.fori_loop(0, 2000, lambda _, x: x * 0.5, jnp.ones((64,)))
    records = jnp.concatenate(
        [weights.w_in.reshape(weights.capacity, -1), weights.w_out.reshape(weights.capacity, -1)], 1
    )
    return records.at[slots].get(mode="fill", fill_value=0) + delay.min()


class LoaderMachine(RuleBasedStateMachine):
    """Requests, slow and failing reads, cancellations, running steps, commits and synchronous loads in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = FakeReader()
        self.tickets: list[LoadTicket] = []
        self.cancelled: list[LoadTicket] = []
        self.running: list[tuple[list[jax.Array], list[np.ndarray]]] = []  # what steps read, and should read

    @initialize(
        window=st.integers(1, 8),
        cached=st.integers(0, 4),
        fill=st.booleans(),
        piece_bytes=st.sampled_from([RECORD_FORMAT.nbytes, RECORD_FORMAT.nbytes, 12, 24]),  # one round, one, three, two
        workers=st.integers(1, 2),
        filling=st.booleans(),
    )
    def build(self, window: int, cached: int, fill: bool, piece_bytes: int, workers: int, filling: bool) -> None:
        self.store = store = ExpertStore(
            self.reader,
            RECORD_FORMAT,
            len(CAPACITIES),
            NUM_EXPERTS,
            cached * RECORD_FORMAT.nbytes,
            piece_bytes=piece_bytes,
        )
        self.slab = ExpertSlab(RECORD_FORMAT, CAPACITIES, piece_bytes=piece_bytes)
        self.table = SlotTable(CAPACITIES, NUM_EXPERTS, sharding=self.slab.sharding)
        self.loader = ExpertLoader(
            store, self.slab, self.table, window=window, retries=1, backoff=0.0005, workers=workers
        )
        if fill:
            self.loader.fill([range(capacity) for capacity in CAPACITIES])
        if filling:
            store.start_filling(itertools.product(range(len(CAPACITIES)), range(NUM_EXPERTS)))

    @rule(layer=layers, expert=experts, evict=st.none() | experts, priority=st.floats(0, 1))
    def request(self, layer: int, expert: int, evict: int | None, priority: float) -> None:
        if evict != expert:
            self.tickets.append(self.loader.request(layer, expert, priority, evict=evict))

    @rule(layer=layers, load=choices, evict=choices, priority=st.floats(0, 1))
    def request_swap(self, layer: int, load: int, evict: int, priority: float) -> None:
        """What a policy does: an absent expert for a resident one."""
        absent, resident = np.flatnonzero(~self.table.resident_mask[layer]), self.table.resident(layer)
        if len(resident):
            load, evict = int(absent[load % len(absent)]), int(resident[evict % len(resident)])
            self.tickets.append(self.loader.request(layer, load, priority, evict=evict))

    @rule(layer=layers, failing=st.sets(experts, min_size=2), times=st.integers(1, 3))
    def make_reads_fail(self, layer: int, failing: set[int], times: int) -> None:
        for expert in failing:
            self.reader.fail(layer, expert, times)

    @rule(fast=st.sampled_from([True, True, False]))
    def change_pace_of_reads(self, fast: bool) -> None:
        (self.reader.gate.set if fast else self.reader.gate.clear)()

    @precondition(lambda self: self.reader.gate.is_set())
    @rule()
    def stage(self) -> None:
        assert self.loader.wait_idle(20)

    @rule()
    def commit(self) -> None:
        assert all(ticket.state is LoadState.COMMITTED for ticket in self.loader.commit())

    @rule(which=choices)
    def cancel(self, which: int) -> None:
        if self.tickets:
            ticket = self.tickets[which % len(self.tickets)]
            if self.loader.cancel(ticket):
                self.cancelled.append(ticket)

    @rule()
    def dispatch_a_step(self) -> None:
        """What follows until its end must not reach what the step reads."""
        table = self.table.device_table()
        read = [read_slowly(weights, table[layer]) for layer, weights in enumerate(self.slab.weights)]
        self.running.append((read, [self.records(layer) for layer in range(len(CAPACITIES))]))

    @rule()
    def end_the_steps(self) -> None:
        for read, want in self.running:
            for layer, records in enumerate(read):
                np.testing.assert_array_equal(records, want[layer])
        self.running.clear()

    def records(self, layer: int) -> np.ndarray:
        """By expert, the record that a step should find, or zeros where the expert is absent."""
        resident = self.table.resident_mask[layer]
        zeros = np.zeros(RECORD_FORMAT.size, RECORD_FORMAT.dtype)
        return np.stack([expected(layer, e) if resident[e] else zeros for e in range(NUM_EXPERTS)])

    @precondition(lambda self: self.reader.gate.is_set())
    @rule(layer=layers, wanted=st.lists(experts, max_size=3), evictable=st.permutations(range(NUM_EXPERTS)))
    def load_now(self, layer: int, wanted: list[int], evictable: list[int]) -> None:
        before = self.table.resident(layer).tolist()
        try:
            self.loader.load_now(layer, wanted, evictable)
        except CapacityError:
            assert self.table.resident(layer).tolist() == before
        except OSError:
            pass
        else:
            assert set(wanted) <= set(self.table.resident(layer).tolist())

    @invariant()
    def slab_and_table_agree(self) -> None:
        for layer, weights in enumerate(self.slab.weights):
            w_in, w_out = np.asarray(weights.w_in), np.asarray(weights.w_out)
            for slot, expert in enumerate(self.table.expert_of_slot(layer)):
                if expert == EMPTY and self.slab.rounds.pieces:
                    continue  # written in part
                record = np.concatenate([w_in[slot].ravel(), w_out[slot].ravel()])
                want = np.zeros(RECORD_FORMAT.size) if expert == EMPTY else expected(layer, int(expert))
                np.testing.assert_array_equal(record, want)

    @invariant()
    def both_directions_of_the_table_agree(self) -> None:
        for layer, expert in itertools.product(range(len(CAPACITIES)), range(NUM_EXPERTS)):
            slot = self.table.slot(layer, expert)
            assert slot == CAPACITIES[layer] or self.table.expert_of_slot(layer)[slot] == expert
        np.testing.assert_array_equal(self.table.device_table(), self.table.slot_of_expert)

    @invariant()
    def what_was_cancelled_stays_cancelled(self) -> None:
        assert all(ticket.state is LoadState.CANCELLED for ticket in self.cancelled)

    def teardown(self) -> None:
        self.end_the_steps()
        self.reader.gate.set()
        if hasattr(self, "loader"):
            while self.loader.wait_idle(20) and self.loader.has_ready:
                self.loader.commit()
            for layer, capacity in enumerate(CAPACITIES):  # no slot stays reserved for nothing
                assert len(self.table.empty_slots(layer)) + len(self.table.resident(layer)) == capacity
            self.slab_and_table_agree()
            self.loader.close()
            self.store.close()
            stats = self.loader.stats
            assert stats.loaded_bytes == stats.loads * RECORD_FORMAT.nbytes
            assert stats.loads <= stats.staged_bytes // RECORD_FORMAT.nbytes


TestLoaderInvariants = LoaderMachine.TestCase
TestLoaderInvariants.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# Where annotations are checked at run time, the checks that worker threads make draw random numbers of their own.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")
