import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from emoe_jax.errors import ConfigError
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.experts.store import ExpertStore, aligned_record
from tests.experts.fake_reader import RECORD_FORMAT, FakeReader, expected


def make_store(reader: FakeReader, records: int, **options) -> ExpertStore:
    return ExpertStore(
        reader, RECORD_FORMAT, num_layers=2, num_experts=8, host_budget_bytes=records * RECORD_FORMAT.nbytes, **options
    )


def test_records_are_aligned_read_only_and_right():
    record = make_store(FakeReader(), 0).read(1, 5)
    assert isinstance(record, np.ndarray)
    np.testing.assert_array_equal(record, expected(1, 5))
    assert record.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        record[0] = 1


def test_device_put_of_a_record_aliases_it():
    # The reason why a record is never written again: on CPU the device array *is* the record.
    record_format = RecordFormat.plain((64, 32), (32, 32), np.dtype(np.float32))
    record = aligned_record(record_format)
    record[:] = 1
    staged = jax.device_put(record)
    assert staged.unsafe_buffer_pointer() == record.ctypes.data
    record[:] = 2
    assert np.asarray(staged)[0] == 2


def test_host_tier_evicts_the_least_recently_used():
    reader = FakeReader()
    store = make_store(reader, records=2)
    for expert in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1, then 1 that of 2
        store.read(0, expert)
    assert reader.reads == [(0, 0), (0, 1), (0, 2), (0, 1)]
    assert [store.is_in_host_memory(0, expert) for expert in range(3)] == [True, True, False]
    assert (store.stats.hits, store.stats.reads, store.stats.evictions) == (2, 4, 2)
    assert store.stats.read_bytes == 4 * RECORD_FORMAT.nbytes
    assert store.stats.host_bytes == 2 * RECORD_FORMAT.nbytes


def test_without_a_budget_every_read_goes_to_the_files():
    reader = FakeReader()
    store = make_store(reader, records=0)
    store.read(0, 0)
    store.read(0, 0)
    assert len(reader.reads) == 2
    assert store.stats.host_bytes == 0


def test_a_record_outlives_its_eviction():
    store = make_store(FakeReader(), records=1)
    kept = store.read(0, 0)
    for expert in range(1, 8):
        store.read(0, expert)
    np.testing.assert_array_equal(kept, expected(0, 0))


@pytest.mark.parametrize("records", [0, 4])
def test_threads_share_one_read_of_an_expert(records: int):
    reader = FakeReader()
    store = make_store(reader, records)
    reader.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(store.read, 0, 3) for _ in range(4)]
        for _ in range(1000):
            if reader.reads and all(future.running() for future in results):
                break
            threading.Event().wait(0.001)
        threading.Event().wait(0.3)
        reader.gate.set()
        records_read = [future.result(10) for future in results]
    assert reader.reads == [(0, 3)]
    assert all(record is records_read[0] for record in records_read)


def test_a_failed_read_is_not_kept_and_may_be_tried_again():
    reader = FakeReader()
    store = make_store(reader, records=4)
    reader.fail(1, 2, times=1)
    with pytest.raises(OSError, match="expert 2 of layer 1"):
        store.read(1, 2)
    assert not store.is_in_host_memory(1, 2)
    np.testing.assert_array_equal(store.read(1, 2), expected(1, 2))
    assert (store.stats.failed_reads, store.stats.reads) == (1, 1)


def test_pinned_host_tier():
    store = make_store(FakeReader(), records=4, memory_kind="pinned_host")
    record = store.read(0, 1)
    assert isinstance(record, jax.Array)
    assert record.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(record, expected(0, 1))
    assert store.read(0, 1) is record


def test_a_cpu_s_tier_has_records_where_they_were_read(monkeypatch: pytest.MonkeyPatch):
    """As arrays of the device, which take no memory of their own."""
    made: list[np.ndarray] = []

    def noted(record_format: RecordFormat) -> np.ndarray:
        made.append(aligned_record(record_format))
        return made[-1]

    monkeypatch.setattr("emoe_jax.experts.store.aligned_record", noted)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    record = make_store(FakeReader(), records=4, sharding=sharding).read(0, 1)
    assert isinstance(record, jax.Array)
    assert record.sharding == sharding
    assert record.unsafe_buffer_pointer() == made[0].ctypes.data
    np.testing.assert_array_equal(record, expected(0, 1))
    for budget, piece_bytes in ((0, 1 << 20), (4, 64)):  # nothing is kept; in pieces, which are cut out of it
        store = make_store(FakeReader(), budget, sharding=sharding, piece_bytes=piece_bytes)
        assert isinstance(store.read(0, 1), np.ndarray)


def test_without_page_locked_memory_left_the_tier_stays_as_large_as_it_is(monkeypatch: pytest.MonkeyPatch):
    store = make_store(FakeReader(), records=4, memory_kind="pinned_host")
    pinned = [store.read(0, expert) for expert in range(2)]

    def refuse(message: str) -> Callable[..., None]:
        def device_put(*_: object) -> None:
            raise jax.errors.JaxRuntimeError(message)

        return device_put

    with monkeypatch.context() as patched:
        patched.setattr(jax, "device_put", refuse("INTERNAL: the device is gone"))
        with pytest.raises(jax.errors.JaxRuntimeError, match="the device is gone"):
            store.read(0, 2)
        patched.setattr(jax, "device_put", refuse("RESOURCE_EXHAUSTED: out of host memory"))
        record = store.read(0, 2)
    assert all(isinstance(record, jax.Array) for record in pinned)
    assert isinstance(record, np.ndarray)
    np.testing.assert_array_equal(record, expected(0, 2))
    assert [store.is_in_host_memory(0, expert) for expert in range(3)] == [False, True, True]
    assert (store.stats.unpinned, store.stats.host_bytes) == (1, 2 * RECORD_FORMAT.nbytes)
    assert isinstance(store.read(0, 3), jax.Array)
    assert store.stats.host_bytes == 2 * RECORD_FORMAT.nbytes


def test_out_of_range_and_negative_budget_are_refused():
    store = make_store(FakeReader(), 1)
    with pytest.raises(IndexError, match=r"no expert 8 in layer 0: 2 x 8"):
        store.read(0, 8)
    with pytest.raises(IndexError, match="no expert 0 in layer 2"):
        store.read(2, 0)
    with pytest.raises(ConfigError, match="-5 bytes"):
        ExpertStore(FakeReader(), RECORD_FORMAT, 1, 1, host_budget_bytes=-5)
