"""Loads in the background: requested, staged by the worker, committed between steps."""

import threading
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from emoe_jax.errors import ConfigError
from emoe_jax.experts.tickets import LoadState
from tests.experts.fake_reader import RECORD_FORMAT
from tests.experts.rig import Rig


def test_request_stage_commit(rig: Callable[..., Rig]):
    r = rig([2, 3])
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
    assert (stats.loads, stats.loaded_bytes, stats.staged_bytes) == (
        3,
        3 * RECORD_FORMAT.nbytes,
        3 * RECORD_FORMAT.nbytes,
    )
    assert stats.bandwidth is not None
    assert stats.bandwidth > 0


def test_commit_goes_by_priority(rig: Callable[..., Rig]):
    r = rig([2])
    for expert, priority in ((0, 1.0), (1, 3.0), (2, 2.0)):
        r.loader.request(0, expert, priority)
    assert r.loader.wait_idle(10)
    assert [ticket.expert for ticket in r.loader.commit()] == [1, 2]  # there is no slot for a third
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
    r = rig([4])
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


def test_the_window_bounds_what_is_staged(rig: Callable[..., Rig]):
    r = rig([8], window=3)
    for expert in range(8):
        r.loader.request(0, expert)
    for staged in (3, 6, 8):
        assert r.loader.wait_idle(10)
        assert len(r.reader.reads) == staged
        r.loader.commit()
    r.check()


def test_bandwidth_budget(rig: Callable[..., Rig]):
    r = rig([8], bandwidth=RECORD_FORMAT.nbytes / 0.05, window=8)
    began = time.perf_counter()
    for expert in range(5):
        r.loader.request(0, expert)
    assert r.loader.wait_idle(10)
    assert time.perf_counter() - began > 0.19
    with pytest.raises(ConfigError, match="link bandwidth of 0 bytes/s"):
        rig([1], bandwidth=0)


def test_close_joins_the_worker_and_cancels(rig: Callable[..., Rig]):
    before = set(threading.enumerate())
    r = rig([4], bandwidth=1.0)
    tickets = [r.loader.request(0, expert) for expert in range(4)]
    r.loader.close()
    assert not set(threading.enumerate()) - before
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
