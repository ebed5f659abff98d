"""What a query must not see cannot reach it, whatever that memory holds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax.attention.paged import KVView, LayerKV, paged_attend
from emoe_jax.attention.sums import attention_mask
from emoe_jax.attention.uncached import BLOCK, attend, attend_causally
from emoe_jax.config import ModelConfig
from emoe_jax.scheduling.pages import PAGE_SIZE

N, K, H = 4, 2, 8
CONFIG = ModelConfig(
    family="test",
    vocab_size=8,
    hidden_size=N * H,
    num_layers=1,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    max_position=1024,
    num_experts=2,
    top_k=1,
    expert_hidden=8,
    moe_layers=(0,),
    attention_scale=H**-0.5,
)
PAGES = 40
STALE = [np.nan, np.inf, -np.inf, 3e38]
SHAPES = [  # starts, lengths, T, pages per block table, window
    ([20, 3], [1, 1], 1, 12, None),
    ([0], [5], 8, 3, None),
    ([15, 0, 0], [1, 1, 0], 1, 9, None),  # the last row pads the batch
    ([130], [40], 64, 11, None),  # two blocks of pages, padded rows
    ([150, 8], [1, 1], 1, 12, 16),  # the short row's first block is none that the long one sees
    ([100], [60], 64, 12, 7),
]


def run(cache: LayerKV, starts: list[int], lengths: list[int], T: int, width: int, window: int | None, **new: Any):
    """The attended rows `[B, T, N, H]` of sequences whose pages are 1, 2, ... in order, and the pages after it."""
    B = len(starts)
    tables = np.zeros((B, width), np.int32)
    following = 1
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        count = -(-(start + length) // PAGE_SIZE) if length else 0
        tables[row, :count] = range(following, following + count)
        following += count
    positions = np.asarray(starts, np.int32)[:, None] + np.arange(T, dtype=np.int32)
    valid = np.arange(T) < np.asarray(lengths)[:, None]
    view = KVView(jnp.asarray(positions), jnp.asarray(valid), jnp.asarray(tables))
    q, k, v = (jax.random.normal(key, (B, T, heads, H)) for key, heads in zip(_KEYS, (N, K, K), strict=True))
    attended, cache = jax.jit(paged_attend(CONFIG, window, cache, view))(
        new.get("q", q), new.get("k", k), new.get("v", v)
    )
    return np.asarray(attended), cache, valid, tables


_KEYS = jax.random.split(jax.random.key(3), 3)


def pages(fill: float | None = None) -> LayerKV:
    """Random pages, or pages full of one number."""
    keys = jax.random.split(jax.random.key(5), 2)
    k, v = (jax.random.normal(key, (PAGES, PAGE_SIZE, K, H)) for key in keys)
    return LayerKV(k, v) if fill is None else LayerKV(jnp.full_like(k, fill), jnp.full_like(v, fill))


def context_only(tables: np.ndarray, starts: list[int], lengths: list[int], window: int | None) -> np.ndarray:
    """Which places of the pages hold tokens that a row of the batch may see, `[pages, page]`."""
    seen = np.zeros((PAGES, PAGE_SIZE), bool)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        oldest = 0 if window is None else max(0, start - window + 1)
        for position in range(oldest, start + length if length else 0):
            seen[tables[row, position // PAGE_SIZE], position % PAGE_SIZE] = True
    return seen


@pytest.mark.parametrize("stale", STALE)
@pytest.mark.parametrize(("starts", "lengths", "T", "width", "window"), SHAPES)
def test_memory_outside_the_context_changes_no_bit(
    stale: float, starts: list[int], lengths: list[int], T: int, width: int, window: int | None
) -> None:
    clean = pages()
    want, _, valid, tables = run(clean, starts, lengths, T, width, window)
    seen = context_only(tables, starts, lengths, window)[..., None, None]
    dirty = jax.tree.map(lambda ours, theirs: jnp.where(seen, ours, theirs), clean, pages(stale))
    got, _, _, _ = run(dirty, starts, lengths, T, width, window)
    assert np.isfinite(want[valid]).all()
    np.testing.assert_array_equal(got[valid], want[valid])
    np.testing.assert_array_equal(got[~valid], np.zeros_like(got[~valid]))


@pytest.mark.parametrize("lost", [np.nan, np.inf])
@pytest.mark.parametrize(("length", "at"), [(8, 5), (40, 17), (64, 63)])
def test_a_later_token_of_the_chunk_does_not_reach_an_earlier_one(lost: float, length: int, at: int) -> None:
    T = 64
    k, v = (jax.random.normal(key, (1, T, K, H)) for key in _KEYS[1:])
    want, *_ = run(pages(), [0], [length], T, 12, None, k=k, v=v)
    got, *_ = run(pages(), [0], [length], T, 12, None, k=k, v=v.at[0, at, 0, 3].set(lost))
    np.testing.assert_array_equal(got[0, :at], want[0, :at])
    assert not np.isfinite(got[0, at:length]).all(axis=(1, 2)).any()


@pytest.mark.parametrize(("T", "at"), [(1, 0), (6, 2), (33, 30)])
def test_a_value_that_is_seen_is_not_hidden(T: int, at: int) -> None:
    """Even where its weight underflows: a sum of NaN is no sum without it."""
    q = jnp.zeros((1, T, N, H)).at[..., 0].set(1e4)
    k = jnp.zeros((1, T, K, H)).at[:, at, :, 0].set(-1e4)
    v = jnp.ones((1, T, K, H)).at[:, at].set(jnp.nan)
    positions = jnp.arange(T, dtype=jnp.int32)
    out = attend(q, k, v, attention_mask(positions[None], positions, None), 1.0)
    assert np.isfinite(out[0, :at]).all()
    assert np.isnan(out[0, at:]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_of_a_batch_do_not_reach_each_other(dtype: str) -> None:
    """A row of NaN beside others, in caches of every dtype: its own pages hold NaN, theirs are as without it."""
    starts, lengths = [30, 17, 45], [1, 1, 1]
    cache = jax.tree.map(lambda x: x.astype(dtype), pages())
    q, k, v = (
        jax.random.normal(key, (3, 1, heads, H)).astype(dtype) for key, heads in zip(_KEYS, (N, K, K), strict=True)
    )
    want, *_ = run(cache, starts, lengths, 1, 5, None, q=q, k=k, v=v)
    lost = {name: x.at[1].set(jnp.nan) for name, x in (("q", q), ("k", k), ("v", v))}
    got, after, _, tables = run(cache, starts, lengths, 1, 5, None, **lost)
    np.testing.assert_array_equal(got[[0, 2]], want[[0, 2]])
    assert np.isnan(got[1]).all()
    spoilt = np.isnan(np.asarray(after.v, np.float32)).any(axis=(1, 2, 3))
    assert np.flatnonzero(spoilt).tolist() == [tables[1, 17 // PAGE_SIZE]]


@pytest.mark.parametrize("window", [None, 100, 700])
@pytest.mark.parametrize("T", [BLOCK, BLOCK + 1, 2 * BLOCK + 37])
def test_blocks_of_a_long_sequence_are_attention(T: int, window: int | None) -> None:
    q, k, v = (jax.random.normal(key, (2, T, heads, H)) for key, heads in zip(_KEYS, (N, K, K), strict=True))
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
    want = attend(q, k, v, attention_mask(positions, positions[0], window), 0.5)
    np.testing.assert_allclose(attend_causally(q, k, v, positions, window, 0.5), want, atol=1e-5)


def test_scores_do_not_grow_with_the_square_of_the_length() -> None:
    temporaries = []
    for T in (2048, 4096, 8192):
        operands: list[Any] = [jax.ShapeDtypeStruct((1, T, heads, H), jnp.float32) for heads in (N, K, K)]
        positions: Any = jax.ShapeDtypeStruct((1, T), jnp.int32)
        compiled = jax.jit(attend_causally, static_argnums=(4, 5)).lower(*operands, positions, None, 0.5).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        temporaries.append(memory.temp_size_in_bytes)
    inputs = 8192 * (N + 2 * K) * H * 4
    assert temporaries[2] < 2.2 * temporaries[1] < 5 * temporaries[0]
    assert temporaries[2] < 4 * inputs + 4 * 4 * N * BLOCK * BLOCK
