import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax.experts.huge_pages import use_huge_pages
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.experts.slab import COMMIT_SIZES, ExpertSlab, commit_experts
from emoe_jax.experts.store import ExpertStore
from emoe_jax.experts.weights import ExpertWeights
from tests.experts.fake_reader import RECORD_FORMAT, FakeReader, expected
from tests.lowering import export_for_cuda

WIDE = RecordFormat.plain((512, 128), (128, 256), np.dtype(np.float32))


def contents(slab: ExpertSlab, layer: int, slot: int) -> np.ndarray:
    """The slot's weights as a record."""
    return np.concatenate([np.asarray(array[slot]).ravel() for array in jax.tree.leaves(slab.weights[layer])])


def compiled_commits() -> int:
    return commit_experts._cache_size()  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]


def pointers(weights: ExpertWeights) -> tuple[int, int]:
    return weights.w_in.unsafe_buffer_pointer(), weights.w_out.unsafe_buffer_pointer()


def test_starts_zeroed_with_a_capacity_per_layer():
    slab = ExpertSlab(RECORD_FORMAT, [3, 2])
    assert [weights.capacity for weights in slab.weights] == [3, 2]
    assert all(not leaf.any() for leaf in jax.tree.leaves(slab.weights))
    assert slab.nbytes == 5 * RECORD_FORMAT.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(slab.weights))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 13])
def test_batches_of_any_size_land_where_they_belong(count: int):
    slab = ExpertSlab(RECORD_FORMAT, [4, 16])
    slots = np.random.default_rng(count).permutation(16)[:count].tolist()
    slab.commit(1, [slab.stage(expected(1, expert)) for expert in range(count)], slots)
    for slot in range(16):
        want = expected(1, slots.index(slot)) if slot in slots else np.zeros(RECORD_FORMAT.size)
        np.testing.assert_array_equal(contents(slab, 1, slot), want)
    assert not np.asarray(slab.weights[0].w_in).any()


@pytest.mark.parametrize(
    ("record_format", "calls"),
    [(RECORD_FORMAT, [4, 8, 8, 8]), (WIDE, [2, 1, 4, 1, 8, 4, 1])],
    ids=["small", "wide"],
)
def test_small_records_fill_a_call_up(monkeypatch: pytest.MonkeyPatch, record_format: RecordFormat, calls: list[int]):
    """3, 5 and 13 of them: a call costs more than to write a small record twice, and less than a large one."""
    slab = ExpertSlab(record_format, [13])
    sizes: list[int] = []

    def counted(weights: ExpertWeights, staged: tuple, slots: np.ndarray) -> ExpertWeights:
        sizes.append(len(staged))
        return commit_experts(weights, staged, slots)

    monkeypatch.setattr("emoe_jax.experts.slab.commit_experts", counted)
    for count in (3, 5, 13):
        records = [np.full(record_format.size, number, np.float32) for number in range(count)]
        slab.commit(0, slab.stage_records(records), range(count))
        for number in range(count):
            assert (contents(slab, 0, number) == number).all()
    assert sizes == calls


@pytest.mark.parametrize("piece_bytes", [1 << 20, 40])
def test_biases_are_parts_of_a_record(piece_bytes: int):
    """Written whole and in pieces, counted in bytes, and not there in a family without."""
    record_format = RecordFormat.plain((6, 3), (3, 3), np.dtype(np.float32), has_biases=True)
    assert record_format.nbytes == RECORD_FORMAT.nbytes + 4 * (6 + 3)
    slab = ExpertSlab(record_format, [2], piece_bytes=piece_bytes)
    assert slab.nbytes == 2 * record_format.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(slab.weights))
    record = np.arange(record_format.size, dtype=np.float32)
    for number in range(len(slab.rounds)):
        staged = slab.stage_round(record, number)
        if slab.rounds.pieces:
            slab.write(0, 1, slab.rounds[number], staged)
        else:
            slab.commit(0, staged, [1])
    np.testing.assert_array_equal(contents(slab, 0, 1), record)
    b_in = slab.weights[0].b_in
    assert b_in is not None
    np.testing.assert_array_equal(b_in[1, :, 0], record[27:33])
    slab.resize(0, 3, [1])
    np.testing.assert_array_equal(contents(slab, 0, 0), record)
    assert len(jax.tree.leaves(ExpertSlab(RECORD_FORMAT, [2]).weights[0])) == 2


@pytest.mark.parametrize("memory_kind", [None, "pinned_host"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_store_to_slab(memory_kind: str | None, dtype: str):
    record_format = RecordFormat.plain((6, 3), (3, 3), np.dtype(jnp.dtype(dtype)))
    store = ExpertStore(FakeReader(), record_format, 1, 4, 4 * record_format.nbytes, memory_kind=memory_kind)
    slab = ExpertSlab(record_format, [2])
    (staged,) = slab.stage_round(store.read(0, 3), 0)
    assert staged.sharding.memory_kind == "device"
    slab.commit(0, [staged], [1])
    np.testing.assert_array_equal(contents(slab, 0, 1), expected(0, 3, record_format))


def test_a_record_of_a_cpu_s_host_memory_is_staged_without_a_call(monkeypatch: pytest.MonkeyPatch):
    slab = ExpertSlab(RECORD_FORMAT, [2])
    store = ExpertStore(FakeReader(), RECORD_FORMAT, 1, 4, 4 * RECORD_FORMAT.nbytes, sharding=slab.sharding)
    records = [store.read(0, expert) for expert in (3, 1)]
    calls: list[object] = []
    monkeypatch.setattr("jax.device_put", lambda *arguments: calls.append(arguments))
    staged = slab.stage_records([record for record in records if not isinstance(record, tuple)])
    assert not calls
    slab.commit(0, staged, [1, 0])
    for slot, expert in ((1, 3), (0, 1)):
        np.testing.assert_array_equal(contents(slab, 0, slot), expected(0, expert))


def test_commits_are_in_place_and_donate_the_old_arrays():
    slab = ExpertSlab(WIDE, [8, 8])
    old = slab.weights
    before = [pointers(weights) for weights in old]
    records = [slab.stage(np.full(WIDE.size, n, np.float32)) for n in range(3)]
    slab.commit(0, records, [5, 0, 2])
    assert [pointers(weights) for weights in slab.weights] == before
    assert old[0].w_in.is_deleted()
    assert slab.weights[1] is old[1]  # other layers are not touched
    assert not records[0].is_deleted()


@pytest.mark.parametrize("size", COMMIT_SIZES)
def test_no_temporaries(size: int):
    slab = ExpertSlab(WIDE, [8])
    staged = (slab.stage(np.zeros(WIDE.size, np.float32)),) * size
    compiled = commit_experts.lower(slab.weights[0], staged, np.arange(size, dtype=np.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 1024


def test_nothing_compiles_after_construction():
    slab = ExpertSlab(RECORD_FORMAT, [16, 5])
    compiled = compiled_commits()
    staged = [slab.stage(expected(0, expert)) for expert in range(16)]
    for count in range(1, 17):
        slab.commit(0, staged[:count], list(range(count)))
    for count in range(1, 6):
        slab.commit(1, staged[:count], list(range(count)))
    store = ExpertStore(FakeReader(), RECORD_FORMAT, 1, 4, 4 * RECORD_FORMAT.nbytes, memory_kind="pinned_host")
    slab.commit(0, slab.stage_round(store.read(0, 0), 0), [3])
    assert compiled_commits() == compiled


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is changed")
def test_huge_pages_keep_zeros_and_place():
    size = 3 << 20
    array = jnp.zeros(size)
    pointer = array.unsafe_buffer_pointer()
    use_huge_pages(array)
    assert array.unsafe_buffer_pointer() == pointer
    assert not np.asarray(array).any()
    written = jax.jit(lambda x: x.at[:].add(jnp.arange(size, dtype=x.dtype)), donate_argnums=0)(array)
    assert written.unsafe_buffer_pointer() == pointer
    np.testing.assert_array_equal(written, np.arange(size, dtype=np.float32))
    use_huge_pages(jnp.zeros(5))  # too small to bother


def test_bad_slots_are_refused_before_anything_is_written():
    slab = ExpertSlab(RECORD_FORMAT, [2])
    staged = [slab.stage(expected(0, expert)) for expert in range(2)]
    for slots, error, message in (
        ([0, 2], IndexError, "slot 2 of layer 0 is not one of 2"),
        ([0, -1], IndexError, "slot -1"),
        ([1, 1], ValueError, "not distinct"),
        ([1], ValueError, "2 records for 1 slots"),
    ):
        with pytest.raises(error, match=message):
            slab.commit(0, staged, slots)
    assert not np.asarray(slab.weights[0].w_in).any()


@pytest.mark.parametrize("size", COMMIT_SIZES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_cuda(size: int, dtype: type):
    record_format = RecordFormat.plain((64, 32), (32, 32), np.dtype(dtype))
    weights = jax.eval_shape(lambda: record_format.empty_weights(8))
    record = jax.ShapeDtypeStruct((record_format.size,), dtype)
    slots = jax.ShapeDtypeStruct((size,), np.int32)
    exported = export_for_cuda(commit_experts, weights, (record,) * size, slots)
    assert exported.platforms == ("cuda",)
