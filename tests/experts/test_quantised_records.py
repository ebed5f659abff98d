"""Quantised records on their way from the store to the slab: every byte of numbers and scales, whole or in pieces."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.experts.loader import ExpertLoader
from emoe_jax.experts.pieces import PIECE_BYTES, ROUND_PIECES, Rounds
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.experts.slab import COMMIT_SIZES, ExpertSlab, commit_experts
from emoe_jax.experts.store import ExpertStore, aligned_record
from emoe_jax.experts.table import EMPTY, SlotTable
from tests.experts.fake_reader import FakeReader
from tests.lowering import export_for_cuda

RECORD_FORMAT = RecordFormat.int8((6, 3), (3, 3))  # 27 numbers: scales do not begin at a multiple of four bytes
WIDE = RecordFormat.int8((512, 128), (128, 256))
EXPERTS = 8


def expected(layer: int, expert: int) -> tuple[np.ndarray, ...]:
    """Arrays that no other expert has."""
    rng = np.random.default_rng((layer, expert))
    return tuple(
        rng.integers(-127, 128, array.shape, np.int8)
        if array.dtype == np.int8
        else rng.standard_normal(array.shape, np.float32)
        for array in RECORD_FORMAT.arrays
    )


class Reader(FakeReader):
    """A reader of such experts, that fails, waits and counts as others do."""

    def read_expert(self, layer: int, expert: int, record: np.ndarray, record_format: RecordFormat) -> None:
        super().read_expert(layer, expert, record, record_format)
        for view, array in zip(record_format.views(record), expected(layer, expert), strict=True):
            view[:] = array


@pytest.mark.parametrize("memory_kind", [None, "pinned_host"])
@pytest.mark.parametrize("piece_bytes", [RECORD_FORMAT.nbytes, 12])
@given(moves=st.lists(st.tuples(st.integers(0, 1), st.integers(0, EXPERTS - 1), st.booleans()), max_size=12))
@settings(max_examples=8, deadline=None)
def test_a_slot_holds_what_the_table_says(
    memory_kind: str | None, piece_bytes: int, moves: list[tuple[int, int, bool]]
) -> None:
    """Loads that a step waits for, and loads in the background, some of which fail at first."""
    reader, capacities = Reader(), (3, 2)
    host = 3 * RECORD_FORMAT.nbytes
    store = ExpertStore(reader, RECORD_FORMAT, 2, EXPERTS, host, memory_kind=memory_kind, piece_bytes=piece_bytes)
    slab, table = ExpertSlab(RECORD_FORMAT, capacities, piece_bytes=piece_bytes), SlotTable(capacities, EXPERTS)
    loader = ExpertLoader(store, slab, table, backoff=0.001)
    try:
        for number, (layer, expert, waits) in enumerate(moves):
            if number % 3 == 0:
                reader.fail(layer, expert, 1)
            residents = table.resident(layer).tolist()
            if waits:
                loader.load_now(layer, [expert], residents)
            elif not table.is_resident(layer, expert):
                is_full = len(residents) == capacities[layer]
                ticket = loader.request(layer, expert, evict=residents[0] if is_full else None)
                while ticket.is_active:
                    assert loader.wait_idle(10)
                    loader.commit()
            for at, weights in enumerate(slab.weights):
                for slot, held in enumerate(table.expert_of_slot(at)):
                    if held != EMPTY:
                        for array, want in zip(jax.tree.leaves(weights), expected(at, int(held)), strict=True):
                            np.testing.assert_array_equal(array[slot], want)
        assert loader.stats.loaded_bytes == loader.stats.loads * RECORD_FORMAT.nbytes
    finally:
        loader.close()
        store.close()


def test_a_record_is_a_quarter_of_float32() -> None:
    """Of an expert of Mixtral-8x7B; its scales are 0.2 per mille of it."""
    eight = RecordFormat.int8((28672, 4096), (4096, 14336))
    plain = RecordFormat.plain((28672, 4096), (4096, 14336), np.dtype(np.float32))
    assert eight.nbytes == plain.nbytes // 4 + 4 * (28672 + 4096)
    assert eight.nbytes / plain.nbytes < 0.2502


@given(
    in_shape=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    out_shape=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    piece_bytes=st.integers(40, 400),
)
def test_pieces_make_up_the_record(in_shape: tuple[int, int], out_shape: tuple[int, int], piece_bytes: int) -> None:
    record_format = RecordFormat.int8(in_shape, out_shape)
    rounds = Rounds(record_format, piece_bytes)
    record = np.random.default_rng(0).integers(-128, 128, record_format.size, np.int8)
    if not rounds.pieces:
        assert record_format.nbytes <= piece_bytes
        return
    copy = np.zeros_like(record)
    arrays = record_format.views(copy)
    for number in range(len(rounds)):
        assert 0 < len(rounds[number]) <= ROUND_PIECES
        for piece, numbers in zip(rounds[number], rounds.of(number, record), strict=True):
            part = arrays[piece.part]
            rows = np.asarray(numbers).view(part.dtype).reshape(piece.rows, *part.shape[1:])
            assert rows.nbytes <= piece_bytes
            part[piece.row : piece.row + piece.rows] = rows
    np.testing.assert_array_equal(copy, record)


def test_an_expert_of_mixtral_is_a_few_pieces() -> None:
    rounds = Rounds(RecordFormat.int8((28672, 4096), (4096, 14336)), PIECE_BYTES)
    assert len(rounds.pieces) == 4 + 2 + 2


@pytest.mark.parametrize("size", COMMIT_SIZES)
def test_commits_are_in_place(size: int) -> None:
    slab = ExpertSlab(WIDE, [8])
    before = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(slab.weights)]
    staged = (slab.stage(np.zeros(WIDE.size, np.int8)),) * size
    compiled = commit_experts.lower(slab.weights[0], staged, np.arange(size, dtype=np.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < size * 8 * (512 + 128)  # scales, and nothing of the weights
    slab.commit(0, staged, list(range(size)))
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(slab.weights)] == before


@pytest.mark.parametrize("size", COMMIT_SIZES)
def test_commits_lower_for_cuda(size: int) -> None:
    weights = jax.eval_shape(lambda: WIDE.empty_weights(8))
    record = jax.ShapeDtypeStruct((WIDE.size,), np.int8)
    slots = jax.ShapeDtypeStruct((size,), np.int32)
    assert export_for_cuda(commit_experts, weights, (record,) * size, slots).platforms == ("cuda",)


def test_starts_zeroed_and_moves_whole_experts_when_it_is_resized() -> None:
    slab = ExpertSlab(RECORD_FORMAT, [3])
    assert not any(array.any() for array in jax.tree.leaves(slab.weights))
    assert slab.nbytes == 3 * RECORD_FORMAT.nbytes == sum(array.nbytes for array in jax.tree.leaves(slab.weights))
    record = np.empty(RECORD_FORMAT.size, np.int8)
    for view, array in zip(RECORD_FORMAT.views(record), expected(0, 5), strict=True):
        view[:] = array
    slab.commit(0, [slab.stage(record)], [1])
    slab.resize(0, 2, [1])
    for array, want in zip(jax.tree.leaves(slab.weights), expected(0, 5), strict=True):
        np.testing.assert_array_equal(array[0], want)


@pytest.mark.parametrize("piece_bytes", [PIECE_BYTES, 200])
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_a_slot_has_every_bit_of_a_record_in_blocks(name: str, piece_bytes: int) -> None:
    """Moved as a whole, and in pieces; any byte may be there, as a weight and in a scale."""
    shapes = (12, 64), (5, 32)
    record_format = RecordFormat.fp8(*shapes) if name == "fp8" else RecordFormat.mxfp4(*shapes, has_biases=True)
    record = aligned_record(record_format)
    record[:] = np.random.default_rng(0).integers(0, 256, record_format.size)
    slab = ExpertSlab(record_format, [3], piece_bytes=piece_bytes)
    if slab.rounds.pieces:
        for number in range(len(slab.rounds)):
            slab.write(0, 1, slab.rounds[number], slab.stage_round(record, number))
    else:
        slab.commit(0, [slab.stage(record)], [1])
    assert bool(slab.rounds.pieces) == (piece_bytes == 200)
    for array, part in zip(jax.tree.leaves(slab.weights[0]), record_format.views(record), strict=True):
        np.testing.assert_array_equal(np.asarray(array[1]).view(np.uint8), np.ascontiguousarray(part).view(np.uint8))
