"""Loads that a step waits for, and the loads at the start of an engine."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from emoe_jax.errors import CapacityError
from emoe_jax.experts.tickets import LoadState, LoadTicket, TicketQueue
from tests.experts.fake_reader import RECORD_FORMAT
from tests.experts.rig import Rig


def test_load_now_is_not_held_back_by_the_bandwidth_budget(rig: Callable[..., Rig]):
    r = rig([8], bandwidth=RECORD_FORMAT.nbytes / 1000)
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


@pytest.mark.parametrize(("piece_bytes", "queued"), [(RECORD_FORMAT.nbytes, 1), (40, 4)], ids=["whole", "in pieces"])
def test_what_host_memory_has_needs_no_queue(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, piece_bytes: int, queued: int
):
    """Only what has to be read does, or has more rounds than one. The worker sleeps on."""
    r = rig([4], piece_bytes=piece_bytes, host_bytes=4 * RECORD_FORMAT.nbytes)
    for expert in (1, 2, 6):
        r.store.read(0, expert)
    asked: list[int] = []
    request = TicketQueue.request

    def counted(queue: TicketQueue, layer: int, expert: int, *others: Any, **options: Any) -> LoadTicket:
        asked.append(expert)
        return request(queue, layer, expert, *others, **options)

    monkeypatch.setattr(TicketQueue, "request", counted)
    assert r.loader.load_now(0, [1, 2, 5, 6]) == 4
    assert len(asked) == queued
    assert 5 in asked
    assert r.table.resident(0).tolist() == [1, 2, 5, 6]
    assert (r.loader.stats.loads, r.store.stats.reads, r.store.stats.hits) == (4, 4, 3)
    assert r.loader.stats.staged_bytes == r.loader.stats.loaded_bytes == 4 * RECORD_FORMAT.nbytes
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
    r = rig([4], retries=2)
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
    r = rig([3, 1, 2])
    seen = []
    r.loader.fill([[4, 1, 7], [0], [6, 2]], lambda done, total: seen.append((done, total)))
    assert [r.table.resident(layer).tolist() for layer in range(3)] == [[1, 4, 7], [0], [2, 6]]
    assert seen[-1] == (6, 6)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    r.check()
    with pytest.raises(CapacityError, match="layer 1 has 0 empty slots for 2 experts"):
        r.loader.fill([[], [3, 4], []])
