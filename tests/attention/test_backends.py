"""Every backend of paged attention against the definition, and what a row must and must not be reached by."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax.attention import BACKENDS, KVView, LayerKV
from emoe_jax.attention.blocks import LARGE, SMALL, Cut
from emoe_jax.attention.schedule import number_of_splits, strides
from emoe_jax.scheduling.pages import PAGE_SIZE
from tests.attention.cases import OP, Case, Shape
from tests.lowering import Counts, export_for_cuda

SHAPES = {
    "decoding beside an empty row": Shape((20, 3, 0, 47), (1, 1, 0, 1), common=1),
    "long contexts in parts": Shape((600, 3, 530), (1, 1, 1), width=70, sinks=True),
    "a window": Shape((600, 8, 70), (1, 1, 1), width=40, window=100),
    "a window of one": Shape((31, 32), (1, 1), window=1),
    "a chunk from the start": Shape((0,), (5,), T=8, width=3, sinks=True),
    "tiles of one chunk": Shape((130, 146, 162), (16, 16, 9), T=16, heads=(6, 2, 80), sequences=(0, 0, 0)),
    "tiles with a window": Shape(
        (0, 90, 97), (7, 7, 2), T=7, width=9, window=20, heads=(5, 1, 96), dtype="bfloat16", sinks=True, common=2
    ),
    "a head per group, bfloat16": Shape((100, 3), (40, 1), T=40, width=9, heads=(3, 3, 64), dtype="bfloat16"),
    "a wide block table": Shape((150,), (40,), T=64, width=70, window=33),
    "between the edges of a window": Shape((1100, 560), (9, 3), T=9, width=72, window=700, heads=(4, 1, 16)),
    "long chunks": Shape((600, 30), (130, 3), T=130, width=48, heads=(2, 1, 8), sinks=True),
    "latent, decoding": Shape((600, 3, 0, 47), (1, 1, 0, 1), width=70, heads=(5, 1, 44), shared=36, common=1),
    "latent, tiles": Shape((130, 146, 0), (16, 9, 5), T=16, heads=(3, 1, 24), shared=16, sequences=(0, 0, 1)),
    "latent, as wide as DeepSeek's": Shape((100,), (3,), T=4, heads=(16, 1, 576), shared=512, dtype="bfloat16"),
}
RUNNABLE = [name for name in BACKENDS if name != "triton"]
"""On a machine without a GPU."""


@pytest.fixture(params=list(SHAPES))
def case(request: pytest.FixtureRequest) -> Case:
    return SHAPES[request.param].case()


def tolerance(case: Case) -> float:
    return 2e-5 if case.shape.dtype == "float32" else 2e-2


@pytest.mark.parametrize("backend", RUNNABLE)
class TestBackends:
    def test_is_attention(self, backend: str, case: Case) -> None:
        got = case.run(backend)
        assert got.dtype == case.q.dtype
        np.testing.assert_allclose(
            got.astype(np.float32), case.by_definition(), rtol=tolerance(case), atol=tolerance(case)
        )
        np.testing.assert_array_equal(got[~case.valid].astype(np.float32), 0)

    def test_memory_outside_the_contexts_changes_no_bit(self, backend: str, case: Case) -> None:
        want = case.run(backend)
        seen = case.seen_places()[:, None, :, None]
        for stale in (np.nan, np.inf, -np.inf, 3e38):
            pages = {name: np.where(seen, x, np.asarray(stale, x.dtype)) for name, x in case.pages.items()}
            np.testing.assert_array_equal(dataclasses.replace(case, **pages).run(backend), want)

    def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_others(self, backend: str, case: Case) -> None:
        want = case.run(backend)
        b, t = np.argwhere(case.valid)[-1]
        pages, offsets = case.seen(b, t)
        for place in {0, len(pages) // 2, len(pages) - 1}:  # at both edges and where no row needs a mask
            at = pages[place], slice(None), offsets[place]
            reached = case.rows_that_see(pages[place], offsets[place])
            for name, lost in (("k", np.nan), ("v", np.nan), ("v", np.inf)):
                if name not in case.pages:
                    continue
                array = case.pages[name].copy()
                array[at] = lost
                got = dataclasses.replace(case, **{name: array}).run(backend)
                np.testing.assert_array_equal(got[~reached], want[~reached])
                assert not np.isfinite(got[reached].astype(np.float32)).all(axis=(1, 2)).any()

    def test_a_value_whose_weight_underflows_is_not_hidden(self, backend: str) -> None:
        case = SHAPES["a chunk from the start"].case()
        q, k, v = np.zeros_like(case.q), np.zeros_like(case.k), np.ones_like(case.k)
        q[..., 0] = 1e4
        page = case.tables[0, 0]
        k[page, :, 2, 0], v[page, :, 2] = -1e4, np.nan
        got = dataclasses.replace(case, q=q, k=k, v=v).run(backend)
        assert np.isfinite(got[0, :2]).all()
        assert not np.isfinite(got[0, 2:5]).any()

    @pytest.mark.parametrize("name", ["decoding beside an empty row", "long contexts in parts"])
    def test_other_rows_change_no_bit(self, backend: str, name: str) -> None:
        """Whether they are longer, shorter, not finite or none."""
        case = SHAPES[name].case()
        want = case.run(backend)[1]
        for position, valid in ((0, True), (90, True), (0, False)):
            positions, found, q = case.positions.copy(), case.valid.copy(), case.q.copy()
            positions[[0, 2]], found[[0, 2]], q[0] = position, valid, np.nan
            tables = case.tables.copy()
            tables[[0, 2]] = tables[1, 0]
            got = dataclasses.replace(case, positions=positions, valid=found, q=q, tables=tables).run(backend)
            np.testing.assert_array_equal(got[1], want)


@pytest.mark.parametrize("name", SHAPES)
def test_a_gpu_gets_one_kernel_and_nothing_that_stalls(name: str) -> None:
    arrays, rule = SHAPES[name].case().arguments()
    counts = Counts.of(export_for_cuda(OP, *arrays, **rule, platform="cuda"))
    assert counts == dataclasses.replace(counts, traced_loops=0, counted_loops=0, conditionals=0, callbacks=0)
    assert counts.kernels == 1


def test_pages_beyond_32_bit_offsets_lower() -> None:
    array: Any = jax.ShapeDtypeStruct
    pages = array((1 << 18, 8, PAGE_SIZE, 128), jnp.bfloat16)
    view = KVView(array((4, 1), jnp.int32), array((4, 1), bool), array((4, 2048), jnp.int32))
    q = array((4, 1, 32, 128), jnp.bfloat16)
    exported = export_for_cuda(OP, q, LayerKV(pages, pages), view, window=None, scale=1.0, platform="cuda")
    assert "xla.gpu.triton" in exported.mlir_module()


@pytest.mark.parametrize("window", [None, 1, 20, 100])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("lowest", "highest"), [(-1, -1), (0, 0), (15, 15), (16, 79), (130, 145), (600, 663)])
def test_the_schedule_reads_each_page_once(lowest: int, highest: int, splits: int, window: int | None) -> None:
    """The pages that rows at `lowest` to `highest` see, and no others. Strides without a mask are seen by all rows."""
    width = 4
    read: list[int] = []
    for split in range(splits):
        plan = strides(lowest, highest, window, split, splits, width)
        for stride in range(int(plan.number)):
            first = int(plan.first) + stride * width
            pages = range(first, min(first + width, int(plan.end)))
            read += pages
            if plan.plain_first <= stride < plan.plain_end:
                assert len(pages) == width
                assert pages[-1] * PAGE_SIZE + PAGE_SIZE - 1 <= lowest
                assert window is None or highest - first * PAGE_SIZE < window
    oldest = 0 if window is None else max(0, lowest - window + 1)
    assert read == list(range(oldest // PAGE_SIZE, highest // PAGE_SIZE + 1) if highest >= 0 else [])


def test_most_strides_of_a_long_context_need_no_mask() -> None:
    plan = strides(8191, 8254, None, 0, 1, 4)
    assert plan.plain_end - plan.plain_first == 128
    assert plan.number == 129


@pytest.mark.parametrize("window", [None, 1, 100, 700])
def test_on_cpu_a_group_walks_its_own_context(window: int | None) -> None:
    """Beside others of any length: all pages that it sees, and large blocks only where no mask is needed."""
    spans = [(8191, 8191), (100, 100), (-1, -1), (600, 663), (1500, 1627), (0, 0)]
    positions = np.asarray([np.linspace(max(low, 0), max(high, 0), 3) for low, high in spans], np.int32)
    valid = np.asarray([[high >= 0] * 3 for _, high in spans])
    cut = Cut.of(KVView(jnp.asarray(positions), jnp.asarray(valid), jnp.zeros((6, 600), jnp.int32)), window)
    for group, (lowest, highest) in enumerate(spans):
        first, left, large, right = (int(x[group]) for x in cut)
        end = first + (left + right) * SMALL + large * LARGE
        oldest = 0 if window is None else max(0, lowest - window + 1)
        assert first == oldest // PAGE_SIZE
        assert highest // PAGE_SIZE < end <= highest // PAGE_SIZE + 1 + SMALL
        inner = range((first + left * SMALL) * PAGE_SIZE, (first + left * SMALL + large * LARGE) * PAGE_SIZE)
        if large:
            assert inner[-1] <= lowest
            assert window is None or highest - inner[0] < window
        elif window is None or window == 700:
            assert lowest < (LARGE + 2 * SMALL) * PAGE_SIZE + 128


@pytest.mark.parametrize(
    ("blocks", "pages", "decoding", "splits"),
    [
        (8, 8, True, 1),
        (8, 2048, True, 32),
        (1, 4096, True, 64),
        (512, 64, True, 1),
        (512, 2048, True, 8),
        (512, 2048, False, 1),
        (8, 2048, False, 32),
    ],
)
def test_contexts_are_split_until_a_gpu_is_full(blocks: int, pages: int, decoding: bool, splits: int) -> None:
    assert number_of_splits(blocks, pages, decoding) == splits


def test_an_unknown_backend_is_named() -> None:
    arrays, rule = SHAPES["a window of one"].case().arguments()
    with pytest.raises(ValueError, match=r"'fast'.*blocks, triton"):
        OP(*arrays, **rule, backend="fast")
