"""Writing to pages and attending to them, and attention without pages."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax.attention import KVView, LayerKV, paged_attend, write
from emoe_jax.attention import attend as attend_pages
from emoe_jax.attention.sums import attention_mask
from emoe_jax.attention.uncached import BLOCK, attend, attend_causally
from emoe_jax.config import LatentConfig, ModelConfig
from emoe_jax.scheduling.pages import PAGE_SIZE
from tests.lowering import Counts, export_for_cuda

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


def pages() -> LayerKV:
    """Random pages."""
    empty = LayerKV.zeros(PAGES, K, H, "float32")
    keys = jax.random.split(jax.random.key(5), 2)
    k, v = (jax.random.normal(key, empty.k.shape) for key in keys)
    return LayerKV(k, v)


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


def test_one_write_of_flat_rows_serves_decoding_rows_and_tiles() -> None:
    """Two decoding rows, and two tiles of one chunk, as calls of their own: one write, then both attend."""
    tables = np.zeros((3, 4), np.int32)
    tables[0, :2], tables[1, :1], tables[2, :3] = [1, 2], [3], [4, 5, 6]
    decoding = KVView(jnp.asarray([[20], [3]]), jnp.ones((2, 1), bool), jnp.asarray(tables[:2]))
    at = 10 + np.arange(16, dtype=np.int32).reshape(2, 8)
    tiles = KVView(jnp.asarray(at), jnp.asarray(at < 23), jnp.asarray(tables[[2, 2]]))
    q, k, v = (jax.random.normal(key, (18, heads, H)) for key, heads in zip(_KEYS, (N, K, K), strict=True))
    places = jax.tree.map(lambda *parts: jnp.concatenate(parts), decoding.places(), tiles.places())
    written = write(pages(), k, v, places)
    rule: Any = {"window": None, "scale": CONFIG.attention_scale}
    for rows, view in ((slice(2), decoding), (slice(2, 18), tiles)):
        shape = (*view.positions.shape, -1, H)
        got = attend_pages(q[rows].reshape(shape), written, view, **rule)
        alone = paged_attend(CONFIG, None, pages(), view)
        if view is tiles:  # as one chunk of one sequence
            whole = KVView(view.positions.reshape(1, -1), view.valid.reshape(1, -1), view.block_tables[:1])
            alone, shape = paged_attend(CONFIG, None, pages(), whole), (1, 16, -1, H)
        want, _ = alone(*(x[rows].reshape(shape) for x in (q, k, v)))
        np.testing.assert_allclose(got.reshape(-1, N, H), want.reshape(-1, N, H), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 100, 700])
@pytest.mark.parametrize("T", [BLOCK, BLOCK + 1, 2 * BLOCK + 37])
def test_blocks_of_a_long_sequence_are_attention(T: int, window: int | None) -> None:
    q, k, v = (jax.random.normal(key, (2, T, heads, H)) for key, heads in zip(_KEYS, (N, K, K), strict=True))
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
    want = attend(q, k, v, attention_mask(positions, positions[0], window), 0.5)
    np.testing.assert_allclose(attend_causally(q, k, v, positions, window, 0.5), want, atol=1e-5)


@pytest.mark.parametrize("T", [9, BLOCK + 37])
def test_sinks_are_a_key_more_without_a_value(T: int) -> None:
    """Uncached, and over pages: as with one more key whose scores are the sinks and whose value is zero."""
    q, k, v = (jax.random.normal(key, (1, T, heads, H)) for key, heads in zip(_KEYS, (N, K, K), strict=True))
    sinks = jnp.asarray([2.0, -1.0, 0.5, 30.0])
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    got = np.asarray(attend_causally(q, k, v, positions, None, 0.5, sinks))
    scores = np.einsum("BTKGH,BSKH->BKGTS", np.asarray(q).reshape(1, T, K, -1, H), np.asarray(k)) * 0.5
    scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
    scores = np.concatenate([scores, np.broadcast_to(sinks.reshape(1, K, -1, 1, 1), (*scores.shape[:-1], 1))], axis=-1)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    chances = (powers / powers.sum(axis=-1, keepdims=True))[..., :-1]
    want = np.einsum("BKGTS,BSKH->BTKGH", chances, np.asarray(v)).reshape(1, T, N, H)
    np.testing.assert_allclose(got, want, atol=1e-5)
    tables = jnp.arange(1, -(-T // PAGE_SIZE) + 1, dtype=jnp.int32)[None]
    view = KVView(positions, jnp.ones((1, T), bool), tables)
    cache = LayerKV.zeros(PAGES, K, H, "float32")
    paged, _ = paged_attend(CONFIG.replace(attention_scale=0.5), None, cache, view)(q, k, v, sinks)
    np.testing.assert_allclose(paged, want, atol=1e-5)


@pytest.mark.parametrize("window", [None, 100])
def test_the_loops_over_blocks_have_trips_that_a_gpu_knows(window: int | None) -> None:
    operands: list[Any] = [jax.ShapeDtypeStruct((2, 2 * BLOCK + 37, heads, H), jnp.float32) for heads in (N, K, K)]
    positions: Any = jax.ShapeDtypeStruct((2, 2 * BLOCK + 37), jnp.int32)
    jitted = jax.jit(attend_causally, static_argnums=(4, 5))
    exported = export_for_cuda(jitted, *operands, positions, window, 0.5)
    counts = Counts.of(exported)
    assert (counts.traced_loops, counts.conditionals, counts.callbacks) == (0, 0, 0)
    assert counts.counted_loops > 0
    products = [line for line in exported.mlir_module().splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("HIGHEST" in line for line in products)  # no TF32


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


def test_values_that_are_a_part_of_the_keys_lie_in_the_pages_once() -> None:
    """A prompt in chunks over latent pages: what it is without pages, with the values beside the keys."""
    config = CONFIG.replace(latent=LatentConfig(12, 4, 6, 6), num_kv_heads=1, head_dim=16)
    q, k = (jax.random.normal(key, (1, 20, heads, 16)) for key, heads in zip(_KEYS, (N, 1), strict=False))
    values = k[..., :12]
    positions = jnp.arange(20, dtype=jnp.int32)[None]
    want = attend_causally(q, k, values, positions, None, config.attention_scale)
    cache = LayerKV.zeros(4, 1, 16, "float32", config.shared_value_dim)
    got = []
    for start, length in ((0, 8), (8, 8), (16, 4)):
        view = KVView.of(jnp.asarray([start]), jnp.asarray([length]), jnp.asarray([[1, 3]]), 8)
        queries, keys, parts = (
            jnp.pad(x, ((0, 0), (0, 4), (0, 0), (0, 0)))[:, start : start + 8] for x in (q, k, values)
        )
        attended, cache = paged_attend(config, None, cache, view)(queries, keys, parts, None)
        got.append(attended[:, :length])
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [(4, 1, PAGE_SIZE, 16)]
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=2e-6)
