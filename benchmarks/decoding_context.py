"""Decode and prefill by length of the context: `python -m benchmarks.decoding --context 512 2048 8192 --json FILE`.

One sequence at a time, in a model of the demo's size with random float32 weights and all experts resident. Both are set
against what the machine allows:

- `decode_ms`: a step at this context, the median of the trials. `decode_floor_ms`: the keys and values of the context,
  read once at the bandwidth of memory.
- `copies_ms`: what it takes to copy the pages of the context, as the CPU backend does before it multiplies, and nothing
  else. XLA:CPU does not read pages in place. The rest of a step is attention's products and the model.
- `prefill_tokens_per_s`: of a prompt of this length. `prefill_floor_tokens_per_s`: its products (attention's, causal,
  and those with weights) at the rate of large matrix products.

JSON: `{"read_gb_per_s": x, "gemm_gflop_per_s": x, "contexts": {"512": {"decode_ms": x, ...}, ...}}`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from benchmarks import timing
from benchmarks.peers import read_bandwidth
from benchmarks.timing import DecodingBatch
from emoe_jax import Engine
from emoe_jax.attention import LayerKV
from emoe_jax.attention.blocks import LARGE
from emoe_jax.config import ModelConfig
from emoe_jax.models import config_from_hf
from emoe_jax.scheduling.pages import PAGE_SIZE
from train.demo.shape import hf_config

STEPS = 8
"""Timed decode steps of each trial."""
_GEMM = 1024
"""Rows and columns of the matrix product whose rate counts."""


def long_config(contexts: Sequence[int]) -> dict[str, Any]:
    """The demo's `config.json` with positions for these contexts."""
    return hf_config(max_position_embeddings=_room(contexts))


def _room(contexts: Sequence[int]) -> int:
    return max(contexts) + STEPS + 1 + DecodingBatch.MARGIN


def measure_contexts(model: str, contexts: Sequence[int], repetitions: int) -> dict[str, Any]:
    """The curve of a checkpoint, and the rates of the machine that its floors rest on."""
    bandwidth, rate = read_bandwidth(), gemm_rate()
    with Engine.load(
        model,
        expert_memory="100%",
        policy="static",
        dtype="float32",
        max_model_len=_room(contexts),
        max_num_seqs=1,
        prefix_caching=False,
    ) as engine:
        config = engine.config
        _trial(engine, min(contexts), 0)  # warms up
        numbers = {}
        for context in contexts:
            prefill, step = (
                statistics.median(times)
                for times in zip(*(_trial(engine, context, seed) for seed in range(1, repetitions + 1)), strict=True)
            )
            read = key_value_bytes(config, context) / bandwidth
            computed = prefill_flops(config, context) / rate
            numbers[str(context)] = {
                "decode_ms": step * 1e3,
                "decode_floor_ms": read * 1e3,
                "copies_ms": copy_seconds(config, context) * 1e3,
                "prefill_s": prefill,
                "prefill_tokens_per_s": context / prefill,
                "prefill_floor_tokens_per_s": context / computed,
            }
    return {"read_gb_per_s": bandwidth / 1e9, "gemm_gflop_per_s": rate / 1e9, "contexts": numbers}


def _trial(engine: Engine, context: int, seed: int) -> tuple[float, float]:
    """Seconds until the first token of a random prompt, and those of a decode step after it."""
    prompt = np.random.default_rng(seed).integers(3, engine.config.vocab_size, context).tolist()
    started = time.perf_counter()
    decoding = DecodingBatch(engine, [prompt], STEPS + 1)
    prefill = time.perf_counter() - started
    seconds = timing.per_call(decoding.step, STEPS).wall
    decoding.stop()
    return prefill, seconds


def key_value_bytes(config: ModelConfig, context: int) -> int:
    """What attention reads in one decode step of one sequence, each key and value once, float32.

    A layer with a window reads the window.
    """
    seen = sum(min(context, config.sliding_window(layer) or context) for layer in range(config.num_layers))
    return 2 * 4 * config.num_kv_heads * config.head_dim * seen


def copy_seconds(config: ModelConfig, context: int) -> float:
    """Of copying the whole large blocks of a context's pages in every layer, block by block, best of a few."""
    pages = context // PAGE_SIZE // LARGE * LARGE
    layers = [
        LayerKV.zeros(1 + pages, config.num_kv_heads, config.head_dim, "float32") for _ in range(config.num_layers)
    ]
    table = jnp.asarray(1 + np.random.default_rng(0).permutation(pages), jnp.int32)[None]

    def copied(cache: LayerKV) -> Array:
        def copy(block: Array, _: tuple[Array, ...]) -> tuple[Array, ...]:
            return cache.rows(jax.lax.dynamic_slice_in_dim(table, block * LARGE, LARGE, axis=1))

        rows = jax.lax.fori_loop(1, pages // LARGE, copy, copy(jnp.int32(0), ()))
        return jnp.stack([x[0, 0] for x in rows])

    if not pages:
        return 0.0
    run = jax.jit(lambda layers: [copied(cache) for cache in layers])
    jax.block_until_ready(run(layers))

    def seconds() -> float:
        started = time.perf_counter()
        jax.block_until_ready(run(layers))
        return time.perf_counter() - started

    return min(seconds() for _ in range(7))


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Of the products of a prompt: those of its tokens with weights, and of its positions with those that they see.

    The head computes one row. Embeddings, norms and rotations are not counted.
    """
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    weights = config.num_layers * (2 * N + 2 * K) * H * D
    weights += len(config.moe_layers) * (config.top_k * config.expert_params + config.num_experts * D)
    pairs = 0
    for layer in range(config.num_layers):
        window = min(tokens, config.sliding_window(layer) or tokens)
        pairs += window * (window + 1) // 2 + (tokens - window) * window
    return 2 * weights * tokens + 2 * 2 * N * H * pairs + 2 * config.vocab_size * D


def gemm_rate() -> float:
    """Operations per second of a large float32 matrix product with all threads, best of a few."""
    x = jnp.ones((_GEMM, _GEMM), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()

    def seconds() -> float:
        started = time.perf_counter()
        product(x, x).block_until_ready()
        return time.perf_counter() - started

    return 2 * _GEMM**3 / min(seconds() for _ in range(7))


def show_contexts(numbers: dict[str, Any], console: Console) -> None:
    """One row per context; a ratio says how many times its floor a step or a prompt takes."""
    config = config_from_hf(hf_config())
    table = Table(title=f"one sequence, {config.num_layers} layers, hidden {config.hidden_size}, float32, medians")
    for column in ("context", "decode", "floor", "ratio", "copies", "prefill", "floor", "ratio"):
        table.add_column(column, justify="right")
    for context, row in numbers["contexts"].items():
        table.add_row(
            context,
            f"{row['decode_ms']:.2f} ms",
            f"{row['decode_floor_ms']:.2f} ms",
            f"{row['decode_ms'] / row['decode_floor_ms']:.1f}",
            f"{row['copies_ms']:.2f} ms",
            f"{row['prefill_tokens_per_s']:.0f} tokens/s",
            f"{row['prefill_floor_tokens_per_s']:.0f} tokens/s",
            f"{row['prefill_floor_tokens_per_s'] / row['prefill_tokens_per_s']:.1f}",
        )
    console.print(table)
    console.print(
        f"memory reads at {numbers['read_gb_per_s']:.1f} GB/s with one thread; matrix products at "
        f"{numbers['gemm_gflop_per_s']:.0f} GFLOP/s with all"
    )
