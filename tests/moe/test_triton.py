"""The Triton backend's schedule, tile sizes and kernels, without a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.moe.dispatch import dispatch
from emoe_jax.moe.kernel_config import DEFAULT_TABLE, SHARED_BYTES, KernelConfig, KernelTable, Tiling
from emoe_jax.moe.operands import Operands
from emoe_jax.moe.row_blocks import RowBlocks, most_blocks
from emoe_jax.moe.triton import triton
from tests.lowering import Counts, export_for_cuda
from tests.moe.cases import OP, Case, abstract_operands, model, random_ids, random_slots

SMALL = KernelConfig(rows=16, tile_in=16, tile_out=16, depth=16, warps=4, stages=2, programs=64)
"""Many tiles and iterations, and a split contraction, for small matrices."""


@partial(jax.jit, static_argnames=("capacity", "rows"))
def traced_schedule(ids: jax.Array, slots: jax.Array, capacity: int, rows: int) -> RowBlocks:
    return RowBlocks.of(dispatch(ids, slots, capacity), rows)


def schedule(ids: np.ndarray, slots: np.ndarray, capacity: int, rows: int) -> RowBlocks:
    blocks = traced_schedule(jnp.asarray(ids, jnp.int32), jnp.asarray(slots, jnp.int32), capacity, rows)
    return RowBlocks(*map(np.asarray, blocks))  # pyright: ignore[reportArgumentType]


class TestSchedule:
    @pytest.mark.parametrize(("R", "rows"), [(1, 16), (8, 16), (100, 32)])
    @given(seed=st.integers(0, 999))
    @settings(max_examples=25, deadline=None, derandomize=True)
    def test_each_expert_is_read_once_per_block_of_its_rows(self, R: int, rows: int, seed: int):
        """Counted: an expert whose rows fit one block is read once, one without rows never."""
        rng = np.random.default_rng(seed)
        E, k, C = 8, 2, 5
        ids = random_ids(rng, R, E, k)
        ids[rng.random(R) < 0.1] = E
        if seed % 3 == 0:
            ids[:, 0] = seed % E  # a popular expert
        slots = random_slots(rng, E, C)
        blocks = schedule(ids, slots, C, rows)
        wished = np.bincount(ids.ravel(), minlength=E + 1)[:E]
        reads = np.bincount(blocks.slot[blocks.size > 0], minlength=C)
        expected = np.zeros(C, int)
        for expert in np.flatnonzero(slots < C):
            expected[slots[expert]] = -(-wished[expert] // rows)
        np.testing.assert_array_equal(reads[:C], expected)
        assert blocks.slot[blocks.size > 0].max(initial=0) < C  # no absent expert
        assert blocks.size.sum() == wished[slots < C].sum()
        covered = [i for start, size in zip(blocks.start, blocks.size, strict=True) for i in range(start, start + size)]
        assert covered == list(range(len(covered)))

    @given(seed=st.integers(0, 999))
    @settings(max_examples=25, deadline=None, derandomize=True)
    def test_no_routing_needs_more_blocks(self, seed: int):
        rng = np.random.default_rng(seed)
        A, E, rows = int(rng.integers(1, 200)), int(rng.integers(1, 12)), 16
        sizes = np.bincount(rng.integers(0, E, A), minlength=E)
        worst = np.ones(min(A, E), int)
        worst[0] += A - len(worst)
        for case in (sizes, worst):
            assert np.sum(-(-case // rows)) <= most_blocks(A, E, rows)
        assert np.sum(-(-worst // rows)) >= most_blocks(A, E, rows) - 1  # and the bound is tight

    @pytest.mark.parametrize("A", [1, 256, 257])
    def test_counting_sorts_as_a_sort_does(self, A: int):
        """Both sides of the number of assignments up to which comparisons are counted."""
        ids = np.random.default_rng(A).integers(0, 9, (A, 1))
        groups = dispatch(jnp.asarray(ids, jnp.int32), jnp.arange(8), 8)
        np.testing.assert_array_equal(groups.order, np.argsort(np.minimum(ids[:, 0], 8), kind="stable"))
        np.testing.assert_array_equal(np.asarray(groups.order)[np.asarray(groups.place)], np.arange(A))


class TestTileSizes:
    @pytest.mark.parametrize("config", DEFAULT_TABLE.configs, ids=lambda config: f"rows={config.rows}")
    @pytest.mark.parametrize("itemsize", [2, 4])
    @pytest.mark.parametrize(("D", "F"), [(4096, 14336), (2048, 768), (24, 40), (1, 1)])
    def test_fit_shared_memory_and_the_matrices(self, config: KernelConfig, itemsize: int, D: int, F: int):
        for matrices in (2, 3):
            both = (config.tiling_in(D, F, matrices, itemsize), matrices), (config.tiling_out(F, D, itemsize), 1)
            for tiling, side_by_side in both:
                stage = (tiling.rows + side_by_side * tiling.tile) * tiling.depth * itemsize
                assert stage * tiling.stages <= SHARED_BYTES
                assert all(size >= 16 and size & (size - 1) == 0 for size in tiling[:3])
        assert config.tiling_in(D, F, 2, itemsize).tile < max(32, 2 * F)
        assert config.tiling_in(D, F, 2, itemsize).depth < max(32, 2 * D)

    def test_few_blocks_split_the_long_axis_and_many_do_not(self):
        config = DEFAULT_TABLE.choose(2, 8)
        assert config.splits(2, 14336, 4096, 2) == 2  # Mixtral 8x7B at batch 1: 128 tiles
        assert config.splits(2, 14336, 1024, 2) == 8
        assert config.splits(8, 14336, 4096, 2) == 1
        assert config.splits(1, 40, 24, 2) == 1  # nothing to split

    @pytest.mark.parametrize(
        ("assignments", "E", "rows"), [(2, 8, 16), (8, 128, 16), (64, 8, 16), (1024, 8, 128), (4096, 128, 32)]
    )
    def test_the_table_goes_by_rows_per_expert(self, assignments: int, E: int, rows: int):
        assert DEFAULT_TABLE.choose(assignments, E).rows == rows

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [("rows", 8, "rows is 8"), ("depth", 48, "depth is 48"), ("warps", 3, "warps 3"), ("stages", 0, "stages 0")],
    )
    def test_what_triton_cannot_tile_is_refused(self, field: str, value: int, message: str):
        sizes = {"rows": 16, "tile_in": 32, "tile_out": 64, "depth": 64, "warps": 4, "stages": 3}
        with pytest.raises(ValueError, match=message):
            KernelConfig(**sizes | {field: value})


@pytest.mark.parametrize(
    ("activation", "ffn"), [("gelu", "double_glu"), ("gelu_tanh", "glu"), ("relu", "glu"), ("silu", "clamped_glu")]
)
def test_other_tile_sizes_give_the_same_numbers(activation: str, ffn: str):
    """A table of its own, sizes that no tile divides, and the output projection in several parts."""
    config = model(6, 2, ffn, 72, 136, activation)
    rng = np.random.default_rng(0)
    case = Case.of(config, random_ids(rng, 5, 6, 2), random_slots(rng, 6, 4), 4)
    assert SMALL.splits(most_blocks(10, 6, 16), 136, 72, 4) > 1
    ids, slots = jnp.asarray(case.ids), jnp.asarray(case.slots)
    slab = case.slab(case.slots, 4)
    operands = Operands(case.rows, ids, case.weights, slots, slab, jnp.zeros_like(case.rows))
    got = jax.jit(lambda operands: triton(operands, config, table=KernelTable((), (SMALL,)), interpret=True))(operands)
    np.testing.assert_allclose(got, case.run("reference"), rtol=2e-5, atol=5e-5)


class TestLowering:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize(
        ("activation", "ffn"),
        [("silu", "glu"), ("gelu", "double_glu"), ("gelu_tanh", "glu"), ("relu", "glu"), ("silu", "clamped_glu")],
    )
    def test_every_activation_and_odd_sizes(self, dtype: str, activation: str, ffn: str):
        config = model(8, 2, ffn, 24, 40, activation)
        operands = abstract_operands(config, 5, 6, dtype)
        exported = export_for_cuda(OP, *operands, config=config, backend="triton", platform="cuda")
        assert Counts.of(exported).kernels == 2

    @pytest.mark.parametrize("R", [1, 512])
    def test_a_slab_beyond_32_bit_offsets(self, R: int):
        config = model(256, 2, hidden=4096, expert_hidden=14336)
        operands = abstract_operands(config, R, 256, "bfloat16")
        exported = export_for_cuda(OP, *operands, config=config, backend="triton", platform="cuda")
        assert Counts.of(exported).kernels == 2


def test_a_tiling_says_what_it_is():
    assert DEFAULT_TABLE.choose(2, 8).tiling_in(4096, 14336, 2, 2) == Tiling(16, 32, 128, 4, 4)
