"""The host tier is filled in the background, from the start and after evictions, and never in front of a load."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from emoe_jax.experts import store as store_module
from emoe_jax.experts.loader import ExpertLoader
from emoe_jax.experts.slab import ExpertSlab
from emoe_jax.experts.store import ExpertStore
from emoe_jax.experts.table import SlotTable
from tests.experts.fake_reader import RECORD_FORMAT, FakeReader, expected
from tests.experts.rig import NUM_EXPERTS

Store = Callable[..., ExpertStore]
ORDER = [(0, expert) for expert in reversed(range(NUM_EXPERTS))]


@pytest.fixture
def reader() -> FakeReader:
    return FakeReader()


@pytest.fixture
def store(reader: FakeReader, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(store_module, "_CPU_SHARE", 1.0)
    stores: list[ExpertStore] = []

    def make(records: int, **options: Any) -> ExpertStore:
        stores.append(ExpertStore(reader, RECORD_FORMAT, 1, NUM_EXPERTS, records * RECORD_FORMAT.nbytes, **options))
        return stores[-1]

    yield make
    reader.gate.set()
    for each in stores:
        each.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kept(store: ExpertStore) -> list[int]:
    return [expert for expert in range(NUM_EXPERTS) if store.is_in_host_memory(0, expert)]


def test_loads_after_the_start_come_from_host_memory(reader: FakeReader, store: Store) -> None:
    """Two slots, and a tier for the other six experts: whatever is exchanged, no load reads a file."""
    tier = store(NUM_EXPERTS - 2)
    slab, table = ExpertSlab(RECORD_FORMAT, [2]), SlotTable([2], NUM_EXPERTS)
    with closing(ExpertLoader(tier, slab, table)) as loader:
        loader.fill([[0, 1]])
        assert kept(tier) == []  # the device has them
        tier.start_filling(ORDER)
        until(lambda: kept(tier) == [2, 3, 4, 5, 6, 7])
        assert reader.reads == [(0, 0), (0, 1), *ORDER[:-2]]
        for load, evict in ((2, 0), (3, 1), (0, 2), (7, 0)):
            loader.request(0, load, evict=evict)
            assert loader.wait_idle(10)
            assert len(loader.commit()) == 1
            until(lambda evict=evict: tier.is_in_host_memory(0, evict))
            np.testing.assert_array_equal(tier.read(0, evict), expected(0, evict))
        stats = tier.stats
        assert stats.reads - stats.fills == 2  # the initial ones
        assert stats.hits == 4 + 4
        assert stats.host_bytes <= (NUM_EXPERTS - 2) * RECORD_FORMAT.nbytes


def test_nothing_is_filled_while_a_load_reads(reader: FakeReader, store: Store) -> None:
    tier = store(4)
    reader.gate.clear()
    load = ExpertLoader(tier, ExpertSlab(RECORD_FORMAT, [2]), SlotTable([2], NUM_EXPERTS))
    with closing(load):
        load.request(0, 0)
        until(lambda: reader.reads == [(0, 0)])
        tier.start_filling(ORDER)
        time.sleep(0.05)
        assert reader.reads == [(0, 0)]
        reader.gate.set()
        until(lambda: len(kept(tier)) == 4)


@pytest.mark.parametrize(("memory_kind", "threads"), [(None, 1), ("pinned_host", 2)])
def test_page_locked_memory_is_filled_two_deep(
    reader: FakeReader, store: Store, memory_kind: str | None, threads: int
) -> None:
    reader.gate.clear()
    tier = store(4, memory_kind=memory_kind)
    tier.start_filling(ORDER)
    until(lambda: len(reader.reads) == threads)
    time.sleep(0.05)
    assert len(reader.reads) == threads
    reader.gate.set()
    until(lambda: len(kept(tier)) == 4)
    assert tier.stats.fills == 4


def test_a_record_that_is_being_read_has_its_room_already(reader: FakeReader, store: Store) -> None:
    reader.gate.clear()
    reader.fail(0, 7, times=1)  # the first of the order
    tier = store(1, memory_kind="pinned_host")
    tier.start_filling(ORDER)
    until(lambda: len(reader.reads) == 1)
    time.sleep(0.05)
    assert len(reader.reads) == 1  # the second thread waits
    reader.gate.set()
    until(lambda: kept(tier) == [6])
    assert (tier.stats.fills, tier.stats.evictions) == (1, 0)


def test_two_workers_read_and_copy_at_once(reader: FakeReader, store: Store) -> None:
    reader.gate.clear()
    loader = ExpertLoader(store(0), ExpertSlab(RECORD_FORMAT, [4]), SlotTable([4], NUM_EXPERTS), workers=2)
    with closing(loader):
        for expert in range(3):
            loader.request(0, expert)
        until(lambda: len(reader.reads) == 2)
        reader.gate.set()
        assert loader.wait_idle(10)
        assert len(loader.commit()) == 3


def test_an_expert_that_cannot_be_read_is_left_out(
    reader: FakeReader, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    reader.fail(0, 6, times=1)
    tier = store(NUM_EXPERTS)
    tier.start_filling(ORDER)
    until(lambda: kept(tier) == [0, 1, 2, 3, 4, 5, 7])
    assert "expert 6 of MoE layer 0 stays out of host memory: cannot read expert 6" in caplog.text
    np.testing.assert_array_equal(tier.read(0, 6), expected(0, 6))


def test_without_a_budget_nothing_is_filled(reader: FakeReader, store: Store) -> None:
    tier = store(0)
    tier.start_filling(ORDER)
    tier.use_residents(np.ones((1, NUM_EXPERTS), bool))
    tier.read(0, 1)
    assert reader.reads == [(0, 1)]
