"""Large records on their way to the slab, a few pieces at a time: a slot written in part holds no expert."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe_jax.experts import slab as slab_module
from emoe_jax.experts.pieces import PIECE_BYTES, ROUND_PIECES, Rounds, default_window, staged_ahead, staging_bytes
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.experts.slab import ExpertSlab
from emoe_jax.experts.store import ExpertStore
from emoe_jax.experts.tickets import LoadState, LoadTicket
from tests.compilations import heard_compilations
from tests.experts.fake_reader import RECORD_FORMAT, FakeReader, expected
from tests.experts.rig import Rig

ROW_BYTES = 12  # a piece of one row: nine pieces, in rounds of four, four and one
MIXTRAL = RecordFormat.plain((28672, 4096), (4096, 14336), np.dtype(np.float16))


def commit_all(r: Rig, ticket: LoadTicket) -> None:
    while ticket.is_active:
        assert r.loader.wait_idle(10)
        r.loader.commit()


@given(
    in_shape=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    out_shape=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    piece_bytes=st.integers(40, 400),
    has_biases=st.booleans(),
)
def test_pieces_make_up_the_record(
    in_shape: tuple[int, int], out_shape: tuple[int, int], piece_bytes: int, has_biases: bool
) -> None:
    record_format = RecordFormat.plain(in_shape, out_shape, np.dtype(np.float32), has_biases)
    rounds = Rounds(record_format, piece_bytes)
    record = np.arange(record_format.size, dtype=np.float32)
    arrays = [np.full(shape, -1, np.float32) for shape in (array.shape for array in record_format.arrays)]
    assert len(rounds.cut(record)) == max(1, len(rounds.pieces))
    if record_format.nbytes <= piece_bytes:
        assert not rounds.pieces
        assert len(rounds) == 1
        return
    for number in range(len(rounds)):
        assert 0 < len(rounds[number]) <= ROUND_PIECES
        for piece, numbers in zip(rounds[number], rounds.of(number, record), strict=True):
            rows = np.asarray(numbers).reshape(-1, arrays[piece.part].shape[1])
            assert rows.nbytes <= piece_bytes
            arrays[piece.part][piece.row : piece.row + len(rows)] = rows
    np.testing.assert_array_equal(np.concatenate([array.ravel() for array in arrays]), record)
    for part in range(len(arrays)):  # so that one executable writes them
        assert len({piece.numbers.stop - piece.numbers.start for piece in rounds.pieces if piece.part == part}) == 1


@pytest.mark.parametrize("record_bytes", [1000, PIECE_BYTES, PIECE_BYTES + 1, 5 * PIECE_BYTES, MIXTRAL.nbytes, 2**30])
def test_staging_is_bounded_whatever_the_expert_takes(record_bytes: int) -> None:
    assert staging_bytes(record_bytes) <= 12 * PIECE_BYTES
    window = default_window(record_bytes)
    assert window >= 1
    if record_bytes <= PIECE_BYTES:
        assert window >= 4
        assert staging_bytes(record_bytes) == 2 * window * record_bytes
    rounds = Rounds(RecordFormat.plain((2, record_bytes // 4), (1, record_bytes // 4), np.dtype(np.int8)))
    assert len(rounds) == 1 or rounds.pieces
    assert staged_ahead(window) <= max(1, window)


def test_pieces_of_mixtral() -> None:
    rounds = Rounds(MIXTRAL)
    assert len(rounds.pieces) == 11
    assert len(rounds) == 3
    assert math.ceil(MIXTRAL.nbytes / PIECE_BYTES) <= 11


def test_a_slot_written_in_part_holds_no_expert(rig: Callable[..., Rig]) -> None:
    r = rig([2], piece_bytes=ROW_BYTES)
    r.loader.load_now(0, [0, 1])
    ticket = r.loader.request(0, 5, evict=1)
    seen = []
    while ticket.state is not LoadState.COMMITTED:
        assert r.loader.wait_idle(10)
        r.loader.commit()
        r.check()
        seen.append((r.table.resident(0).tolist(), r.table.empty_slots(0), r.loader.cancel(ticket)))
    assert seen == [([0], [], False), ([0], [], False), ([0, 5], [], False)]
    assert r.reader.reads == [(0, 0), (0, 1), (0, 5)]  # once, whatever the rounds


def test_one_expert_is_written_at_a_time(rig: Callable[..., Rig]) -> None:
    """A more urgent one that comes in between waits: its slot would hold nothing either."""
    r = rig([2], piece_bytes=ROW_BYTES, window=1)
    first = r.loader.request(0, 5, 1.0)
    assert r.loader.wait_idle(10)
    r.loader.commit()
    second = r.loader.request(0, 6, 2.0)
    for _ in range(2):
        assert r.loader.wait_idle(10)
        r.loader.commit()
    assert (first.state, second.slot) == (LoadState.COMMITTED, None)


def test_a_failure_half_way_brings_back_what_made_room(rig: Callable[..., Rig], monkeypatch: Any) -> None:
    r = rig([2], piece_bytes=ROW_BYTES, retries=1)
    r.loader.load_now(0, [0, 1])
    stage = r.slab.stage_round

    def failing(record: Any, number: int) -> Any:
        if number == 2:
            raise OSError("the link is gone")
        return stage(record, number)

    monkeypatch.setattr(r.slab, "stage_round", failing)
    ticket = r.loader.request(0, 5, evict=1)
    for _ in range(2):
        assert r.loader.wait_idle(10)
        assert r.loader.commit() == []
    assert r.loader.wait_idle(10)
    assert (ticket.state, r.loader.stats.retries) == (LoadState.FAILED, 1)
    assert r.loader.has_ready
    assert r.loader.commit() == []
    assert r.table.empty_slots(0) == [1]
    monkeypatch.setattr(r.slab, "stage_round", stage)
    assert r.loader.must_restore
    r.loader.restore()
    assert r.table.resident(0).tolist() == [0, 1]
    r.check()


def test_load_now_takes_the_slot_of_an_expert_that_is_written_in_part(rig: Callable[..., Rig]) -> None:
    r = rig([2], piece_bytes=ROW_BYTES)
    ticket = r.loader.request(0, 5)
    assert r.loader.wait_idle(10)
    r.loader.commit()
    with pytest.raises(IndexError):
        r.loader.load_now(0, [99])
    assert r.loader.load_now(0, [2, 3]) == 2
    assert ticket.state is LoadState.STALE
    assert r.table.resident(0).tolist() == [2, 3]
    r.check()


def test_load_now_finishes_an_expert_that_is_written_in_part(rig: Callable[..., Rig]) -> None:
    r = rig([2], piece_bytes=ROW_BYTES)
    ticket = r.loader.request(0, 5)
    assert r.loader.wait_idle(10)
    r.loader.commit()
    slot = ticket.slot
    assert r.loader.load_now(0, [2, 5]) == 2
    assert ticket.state is LoadState.COMMITTED
    assert r.table.slot(0, 5) == slot
    r.check()


@pytest.mark.parametrize("donated", [False, True])
@pytest.mark.parametrize("after", [0, 2, 5, 8])
def test_a_failed_write_leaves_nothing_behind(rig: Callable[..., Rig], monkeypatch: Any, donated: bool, after: int):
    """The write of a piece fails in the first, second or third round, before or after it took the slab's arrays."""
    r = rig([3], piece_bytes=ROW_BYTES)
    r.loader.load_now(0, [0, 1])
    ticket = r.loader.request(0, 5, evict=1)
    write, calls = slab_module.write_piece, 0

    def failing(array: jax.Array, *rest: Any) -> jax.Array:
        nonlocal calls
        calls += 1
        if calls != after + 1:
            return write(array, *rest)
        if donated:
            array.delete()
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(slab_module, "write_piece", failing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        commit_all(r, ticket)
    assert ticket.state is LoadState.FAILED
    assert not r.loader.in_flight().any()
    assert len(r.table.empty_slots(0)) + len(r.table.resident(0)) == 3
    r.loader.restore()
    assert {0, 1} <= set(r.table.resident(0).tolist())
    r.loader.load_now(0, [5])
    r.check()


def test_nothing_compiles_after_the_start() -> None:
    with heard_compilations() as heard:
        r = Rig([3, 2], piece_bytes=24)
        before = len(heard)
        r.loader.load_now(0, [3, 4, 5])
        commit_all(r, r.loader.request(1, 0))
        assert len(heard) == before
        r.loader.close()


def test_pinned_records_come_in_pieces() -> None:
    """Nothing can be cut out of an array in page-locked memory."""
    reader = FakeReader()
    store = ExpertStore(
        reader, RECORD_FORMAT, 1, 8, 8 * RECORD_FORMAT.nbytes, memory_kind="pinned_host", piece_bytes=ROW_BYTES
    )
    slab = ExpertSlab(RECORD_FORMAT, [2], piece_bytes=ROW_BYTES)
    record = store.read(0, 3)
    assert isinstance(record, tuple)
    assert {part.sharding.memory_kind for part in record} == {"pinned_host"}
    for number in range(len(slab.rounds)):
        slab.write(0, 1, slab.rounds[number], slab.stage_round(record, number))
    written = np.concatenate([np.asarray(part[1]).ravel() for part in jax.tree.leaves(slab.weights[0])])
    np.testing.assert_array_equal(written, expected(0, 3))
    assert store.stats.host_bytes == RECORD_FORMAT.nbytes
