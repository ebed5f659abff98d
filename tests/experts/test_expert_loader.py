import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from emoe_jax.errors import CapacityError, ConfigError
from emoe_jax.experts.loader import ExpertLoader
from emoe_jax.experts.slab import ExpertSlab
from emoe_jax.experts.store import ExpertStore
from emoe_jax.experts.table import EMPTY, SlotTable
from emoe_jax.experts.tickets import LoadState
from tests.experts.fake_reader import LAYOUT, FakeReader, expected

NUM_EXPERTS = 8


class Rig:
    """Reader, store, slab, table and loader together; `check` compares the slab with what the table says."""

    def __init__(self, capacities: list[int], backoff: float = 0.001, **options: Any):
        self.reader = FakeReader()
        self.store = ExpertStore(self.reader, LAYOUT, len(capacities), NUM_EXPERTS)
        self.slab = ExpertSlab(LAYOUT, capacities)
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


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    rigs = []

    def make(capacities: list[int], **options) -> Rig:
        rigs.append(Rig(capacities, **options))
        return rigs[-1]

    yield make
    for each in rigs:
        each.reader.gate.set()
        each.loader.close()


def test_request_stage_commit(rig: Callable[..., Rig]):
    r = rig([2, 3], workers=2)
    tickets = [r.loader.request(layer, expert) for layer, expert in ((0, 5), (1, 0), (1, 7))]
    assert r.loader.wait_idle(10)
    assert {ticket.state for ticket in tickets} == {LoadState.READY}
    assert not r.table.resident_mask.any()  # staging alone shows nowhere
    assert r.loader.commit() == tickets
    assert {ticket.state for ticket in tickets} == {LoadState.COMMITTED}
    assert r.table.resident(0).tolist() == [5]
    assert r.table.resident(1).tolist() == [0, 7]
    r.check()
    stats = r.loader.stats
    assert (stats.loads, stats.loaded_bytes, stats.staged_bytes) == (3, 3 * LAYOUT.nbytes, 3 * LAYOUT.nbytes)
    assert stats.bandwidth is not None
    assert stats.bandwidth > 0


def test_commit_goes_by_priority_and_limit(rig: Callable[..., Rig]):
    r = rig([4])
    tickets = [r.loader.request(0, expert, priority) for expert, priority in ((0, 1.0), (1, 3.0), (2, 2.0))]
    assert r.loader.wait_idle(10)
    assert [ticket.expert for ticket in r.loader.commit(limit=2)] == [1, 2]
    assert tickets[0].state is LoadState.READY
    assert [ticket.expert for ticket in r.loader.commit(limit=2)] == [0]
    r.check()


def test_staging_goes_by_priority(rig: Callable[..., Rig]):
    r = rig([8], window=8)
    r.reader.gate.clear()
    r.loader.request(0, 0)
    while not r.reader.reads:
        time.sleep(0.001)
    for expert, priority in ((1, 1.0), (2, 3.0), (3, 2.0), (4, 2.0)):
        r.loader.request(0, expert, priority)
    r.loader.request(0, 1, 9.0)  # asked for again, more urgently
    r.reader.gate.set()
    assert r.loader.wait_idle(10)
    assert [expert for _, expert in r.reader.reads] == [0, 1, 2, 3, 4]


def test_one_ticket_per_expert(rig: Callable[..., Rig]):
    r = rig([2])
    r.reader.gate.clear()
    first = r.loader.request(0, 3, 1.0)
    assert r.loader.request(0, 3, 2.0, evict=5) is first
    assert (first.priority, first.evict) == (2.0, 5)
    np.testing.assert_array_equal(np.flatnonzero(r.loader.in_flight()[0]), [3, 5])
    r.reader.gate.set()
    assert r.loader.wait_idle(10)
    r.loader.commit()
    assert not r.loader.in_flight().any()
    assert r.reader.reads == [(0, 3)]


def test_replaces_the_expert_named(rig: Callable[..., Rig]):
    r = rig([2])
    r.load((0, 0), (0, 1))
    r.loader.request(0, 6, evict=0)
    assert r.loader.wait_idle(10)
    r.loader.commit()
    assert r.table.resident(0).tolist() == [1, 6]
    assert r.table.slot(0, 6) == 0
    r.check()


def test_stale_loads_are_dropped_and_counted(rig: Callable[..., Rig]):
    r = rig([2])
    r.load((0, 0), (0, 1))
    by_other_means = r.loader.request(0, 2, 2.0, evict=0)
    victim_gone = r.loader.request(0, 3, 1.0, evict=0)  # 2 takes that place first
    no_place = r.loader.request(0, 4)
    assert r.loader.wait_idle(10)
    assert r.loader.commit() == [by_other_means]
    assert (victim_gone.state, no_place.state) == (LoadState.STALE, LoadState.STALE)
    assert r.loader.stats.wasted == 2
    assert r.table.resident(0).tolist() == [1, 2]
    r.check()


def test_an_expert_that_was_evicted_and_wanted_again_in_one_commit(rig: Callable[..., Rig]):
    r = rig([2])
    r.load((0, 0), (0, 1))
    r.loader.request(0, 2, 3.0, evict=0)
    r.loader.request(0, 0, 2.0, evict=1)
    r.loader.request(0, 3, 1.0, evict=2)  # the slot that was just written
    assert r.loader.wait_idle(10)
    assert len(r.loader.commit()) == 3
    assert r.table.resident(0).tolist() == [0, 3]
    r.check()


def test_same_step_eviction_is_refused(rig: Callable[..., Rig]):
    # The running step needs expert 0, and something asks to put another in its place.
    r = rig([2])
    r.load((0, 0), (0, 1))
    slot = r.table.slot(0, 0)
    generation = r.table.generation(0)[slot]
    r.table.pin(0, [slot])
    ticket = r.loader.request(0, 5, evict=0)
    assert r.loader.wait_idle(10)
    assert r.loader.commit() == []
    assert ticket.state is LoadState.READY
    assert r.loader.stats.deferred == 1
    with pytest.raises(CapacityError, match="must load 1 experts, but only 0 of its 2 slots"):
        r.loader.load_now(0, [6], evictable=[0])
    assert r.table.slot(0, 0) == slot
    assert r.table.generation(0)[slot] == generation
    r.check()
    r.table.unpin(0, [slot])
    assert r.loader.commit() == [ticket]
    assert r.table.slot(0, 5) == slot
    r.check()


def test_a_step_keeps_its_weights_when_a_commit_follows(rig: Callable[..., Rig]):
    # The step is dispatched, not finished, when the slot is overwritten: it must still see what it was given.
    r = rig([2])
    r.load((0, 0), (0, 1))
    step = jax.jit(lambda weights, x: jax.lax.fori_loop(0, 2000, lambda i, y: y * 0.999 + weights.w_in[0].sum(), x))
    want = np.asarray(step(r.slab.weights[0], 1.0))
    for _ in range(5):
        result = step(r.slab.weights[0], 1.0)
        r.loader.load_now(0, [5], evictable=[0])
        np.testing.assert_array_equal(result, want)
        r.loader.load_now(0, [0], evictable=[5])
    r.check()


def test_a_read_that_fails_twice_then_succeeds(rig: Callable[..., Rig]):
    r = rig([2], retries=2)
    r.reader.fail(0, 4, times=2)
    ticket = r.loader.request(0, 4)
    assert r.loader.wait_idle(10)
    assert (ticket.state, ticket.attempts) == (LoadState.READY, 3)
    r.loader.commit()
    assert (r.loader.stats.retries, r.loader.stats.failures) == (2, 0)
    r.check()


def test_a_read_that_keeps_failing_fails_its_ticket_alone(rig: Callable[..., Rig]):
    r = rig([2], retries=1)
    r.reader.fail(0, 4, times=2)
    bad, good = r.loader.request(0, 4, 2.0), r.loader.request(0, 5, 1.0)
    assert r.loader.wait_idle(10)
    assert (bad.state, good.state) == (LoadState.FAILED, LoadState.READY)
    assert isinstance(bad.error, OSError)
    assert r.loader.commit() == [good]
    assert (r.loader.stats.retries, r.loader.stats.failures) == (1, 1)
    r.check()
    r.load((0, 4))  # by now it can be read again
    r.check()


def test_others_go_first_while_a_read_waits_to_be_tried_again(rig: Callable[..., Rig]):
    r = rig([8], backoff=0.5)
    r.reader.fail(0, 0, times=1)
    r.loader.request(0, 0, 9.0)
    r.loader.request(0, 1, 1.0)
    r.loader.request(0, 0, 10.0)  # does not shorten the wait
    assert r.loader.wait_idle(10)
    assert r.reader.reads == [(0, 0), (0, 1), (0, 0)]


def test_a_slow_read_never_holds_up_a_commit(rig: Callable[..., Rig]):
    r = rig([4], workers=2)
    r.load((0, 0))
    r.reader.gate.clear()
    slow = r.loader.request(0, 1)
    while len(r.reader.reads) < 2:
        time.sleep(0.001)
    assert not r.loader.wait_idle(0.01)
    began = time.perf_counter()
    assert r.loader.commit() == []
    assert time.perf_counter() - began < 5
    assert slow.state is LoadState.STAGING
    r.reader.gate.set()
    assert r.loader.wait_idle(10)
    assert r.loader.commit() == [slow]
    r.check()


def test_cancel_at_every_stage(rig: Callable[..., Rig]):
    r = rig([4], window=1)
    ready = r.loader.request(0, 0)
    assert r.loader.wait_idle(10)
    queued = r.loader.request(0, 1)  # the window is full
    assert r.loader.cancel(ready)
    assert r.loader.wait_idle(10)
    assert r.loader.cancel(queued)
    r.reader.gate.clear()
    staging = r.loader.request(0, 2)
    while staging.state is not LoadState.STAGING:
        time.sleep(0.001)
    assert r.loader.cancel(staging)
    assert not r.loader.cancel(staging)
    r.reader.gate.set()
    assert r.loader.wait_idle(10)
    assert r.loader.commit() == []
    assert not r.table.resident_mask.any()
    assert r.loader.stats.cancelled == 3
    assert r.loader.stats.wasted == 1  # the one that was being staged
    r.load((0, 2))
    r.check()


def test_cancel_all(rig: Callable[..., Rig]):
    r = rig([8], window=2)
    tickets = [r.loader.request(0, expert) for expert in range(5)]
    assert r.loader.wait_idle(10)
    assert r.loader.cancel_all() == 5
    assert r.loader.commit() == []
    assert {ticket.state for ticket in tickets} == {LoadState.CANCELLED}
    assert r.loader.stats.cancelled == 5


def test_the_window_bounds_what_is_staged(rig: Callable[..., Rig]):
    r = rig([8], window=3, workers=2)
    for expert in range(8):
        r.loader.request(0, expert)
    for staged in (3, 6, 8):
        assert r.loader.wait_idle(10)
        assert len(r.reader.reads) == staged
        r.loader.commit()
    r.check()


def test_bandwidth_budget(rig: Callable[..., Rig]):
    r = rig([8], bandwidth=LAYOUT.nbytes / 0.05, window=8)
    began = time.perf_counter()
    for expert in range(5):
        r.loader.request(0, expert)
    assert r.loader.wait_idle(10)
    assert time.perf_counter() - began > 0.19
    with pytest.raises(ConfigError, match="link bandwidth of 0 bytes/s"):
        rig([1], bandwidth=0)


def test_load_now_is_not_held_back_by_the_bandwidth_budget(rig: Callable[..., Rig]):
    r = rig([8], bandwidth=LAYOUT.nbytes / 1000)
    tickets = [r.loader.request(0, expert) for expert in range(2)]
    while tickets[0].state is not LoadState.READY:
        time.sleep(0.001)
    r.loader.load_now(0, [5, 6, 7])
    r.check()
    assert tickets[1].state is LoadState.QUEUED


def test_load_now_loads_what_is_missing_in_ascending_order(rig: Callable[..., Rig]):
    r = rig([4])
    r.load((0, 2))
    r.reader.reads.clear()
    assert r.loader.load_now(0, [7, 2, 0, 5, 0]) == 3
    assert r.reader.reads == [(0, 0), (0, 5), (0, 7)]
    assert r.table.resident(0).tolist() == [0, 2, 5, 7]
    assert r.loader.load_now(0, [7, 0]) == 0
    r.check()


def test_load_now_evicts_in_the_order_given_and_never_what_it_needs(rig: Callable[..., Rig]):
    r = rig([4])
    r.loader.load_now(0, range(4))
    assert r.loader.load_now(0, [1, 5, 6], evictable=[4, 1, 3, 0, 2]) == 2
    assert r.table.resident(0).tolist() == [1, 2, 5, 6]
    r.check()
    with pytest.raises(CapacityError, match="layer 0 must load 3 experts, but only 2 of its 4 slots"):
        r.loader.load_now(0, [0, 3, 4], evictable=[1, 2])
    assert r.table.resident(0).tolist() == [1, 2, 5, 6]


def test_load_now_takes_over_a_background_load(rig: Callable[..., Rig]):
    r = rig([2], window=1)
    ready = r.loader.request(0, 3)
    assert r.loader.wait_idle(10)
    queued = r.loader.request(0, 4)
    assert r.loader.load_now(0, [3, 4]) == 2
    assert (ready.state, queued.state) == (LoadState.COMMITTED, LoadState.COMMITTED)
    assert r.reader.reads == [(0, 3), (0, 4)]
    assert r.loader.commit() == []
    r.check()


def test_load_now_waits_for_a_read_that_a_worker_has_begun(rig: Callable[..., Rig]):
    r = rig([2])
    r.reader.gate.clear()
    ticket = r.loader.request(0, 3)
    while ticket.state is not LoadState.STAGING:
        time.sleep(0.001)
    threading.Timer(0.05, r.reader.gate.set).start()
    assert r.loader.load_now(0, [3, 4]) == 2
    assert sorted(r.reader.reads) == [(0, 3), (0, 4)]
    r.check()


def test_load_now_retries_and_then_raises_what_the_reader_raised(rig: Callable[..., Rig]):
    r = rig([4], retries=2, workers=2)
    r.reader.fail(0, 2, times=2)
    assert r.loader.load_now(0, [2]) == 1
    r.reader.fail(0, 5, times=99)
    with pytest.raises(OSError, match="cannot read expert 5 of layer 0"):
        r.loader.load_now(0, [1, 5, 7])
    r.check()
    assert not r.table.is_resident(0, 5)
    r.reader.fail(0, 5, times=0)
    assert r.loader.load_now(0, [5, 7, 1], evictable=[2]) >= 1
    r.check()


def test_fill_reports_progress_over_all_layers(rig: Callable[..., Rig]):
    r = rig([3, 1, 2], workers=2)
    seen = []
    r.loader.fill([[4, 1, 7], [0], [6, 2]], lambda done, total: seen.append((done, total)))
    assert [r.table.resident(layer).tolist() for layer in range(3)] == [[1, 4, 7], [0], [2, 6]]
    assert seen[-1] == (6, 6)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    r.check()
    with pytest.raises(CapacityError, match="layer 1 has 0 empty slots for 2 experts"):
        r.loader.fill([[], [3, 4], []])


def test_close_joins_workers_and_cancels(rig: Callable[..., Rig]):
    r = rig([4], workers=3, bandwidth=1.0)
    tickets = [r.loader.request(0, expert) for expert in range(4)]
    r.loader.close()
    assert not any(thread.name.startswith("expert-loader") and thread.is_alive() for thread in r.loader._threads)
    assert tickets[-1].state is LoadState.CANCELLED
    with pytest.raises(RuntimeError, match="closed"):
        r.loader.request(0, 1)
    r.loader.close()  # again is harmless


def test_requests_out_of_range_are_refused_at_once(rig: Callable[..., Rig]):
    r = rig([2])
    with pytest.raises(IndexError, match="no expert 8 in layer 0: the model has 1 MoE layers of 8 experts"):
        r.loader.request(0, 8)
    with pytest.raises(IndexError, match="no expert 0 in layer 1"):
        r.loader.request(1, 0)
    with pytest.raises(IndexError, match="no expert -1"):
        r.loader.request(0, 0, evict=-1)
    with pytest.raises(ValueError, match="cannot replace itself"):
        r.loader.request(0, 1, evict=1)
    with pytest.raises(IndexError, match="no expert 9"):
        r.loader.load_now(0, [9])


def test_a_commit_that_breaks_leaves_no_slot_with_the_wrong_expert(rig: Callable[..., Rig], monkeypatch):
    r = rig([2, 2])
    r.load((0, 0), (1, 0))
    ticket = r.loader.request(0, 3, evict=0)
    assert r.loader.wait_idle(10)

    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(r.slab, "commit", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        r.loader.commit()
    monkeypatch.undo()
    assert ticket.state is LoadState.FAILED
    assert r.table.resident(0).tolist() == []
    assert r.table.resident(1).tolist() == [0]
    r.load((0, 3))
    r.check()
