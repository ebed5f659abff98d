"""The least that a decode step can take: the bytes that it must read, over the bandwidth of a card.

`python -m benchmarks.verify_gpu --floors` prints the table of `docs/explanation/gpu.md`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from benchmarks.memory.geometries import GEOMETRIES
from emoe_jax.config import ModelConfig
from emoe_jax.models import config_from_hf

GPT_OSS_20B = GEOMETRIES["qwen3-30b-a3b"] | {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "moe_intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
}
"""The sizes of gpt-oss-20b in a family that is there: without sinks, biases and MXFP4."""


class Card(NamedTuple):
    """Of its maker's data sheet."""

    memory_gb: float
    bandwidth: float
    """Bytes per second."""
    flops: float
    """Of bfloat16 products without sparsity, per second."""
    link: float
    """Bytes per second from the host, in one direction."""


CARDS = {
    "RTX 4090": Card(24, 1.008e12, 165e12, 32e9),
    "A100 80 GB": Card(80, 2.039e12, 312e12, 32e9),
    "H100 80 GB": Card(80, 3.35e12, 989e12, 64e9),
}


def distinct_experts(config: ModelConfig, rows: int, slots: int | None = None) -> float:
    """Mean number of different experts that `rows` tokens choose in a layer, if all were chosen alike.

    With `slots` the routers choose among so many.
    """
    count = config.num_experts if slots is None else slots
    return count * (1 - (1 - config.top_k / count) ** rows)


def decode_bytes(config: ModelConfig, batch: int, context: int, dtype: str, slots: int | None = None) -> float:
    """What one decode step of `batch` sequences of `context` tokens reads: weights once, keys and values once."""
    itemsize = jnp.dtype(dtype).itemsize
    return itemsize * (_dense(config) + _experts(config, batch, slots)) + _kv(config, batch, context, itemsize)


def decode_flops(config: ModelConfig, batch: int, context: int) -> float:
    """Floating point operations of such a step: two per weight and row, and those of attention."""
    weights = _dense(config) + len(config.moe_layers) * config.top_k * config.expert_params
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * context
    return 2.0 * batch * (weights + attention)


def _dense(config: ModelConfig) -> float:
    heads = config.num_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_heads)
    ffn = (config.ffn_in_factor + 1) * config.hidden_size * config.dense_hidden
    dense_layers = config.num_layers - len(config.moe_layers)
    router = len(config.moe_layers) * config.hidden_size * config.num_experts
    return config.num_layers * attention + dense_layers * ffn + router + config.vocab_size * config.hidden_size


def _experts(config: ModelConfig, batch: int, slots: int | None) -> float:
    return len(config.moe_layers) * distinct_experts(config, batch, slots) * config.expert_params


def _kv(config: ModelConfig, batch: int, context: int, itemsize: int) -> float:
    read = sum(min(context, config.sliding_window(layer) or context) for layer in range(config.num_layers))
    return 2.0 * batch * read * config.num_kv_heads * config.head_dim * itemsize


def table(batches: tuple[int, ...] = (1, 8, 64), context: int = 2048) -> list[dict[str, Any]]:
    """A row per model and batch: gigabytes and gigaflops of a bfloat16 step, and milliseconds on each card."""
    shapes = {
        "Mixtral-8x7B": GEOMETRIES["mixtral-8x7b"],
        "Qwen3-30B-A3B": GEOMETRIES["qwen3-30b-a3b"],
        "gpt-oss-20b": GPT_OSS_20B,
    }
    rows = []
    for name, raw in shapes.items():
        config = config_from_hf(raw)
        itemsize = 2
        for batch in batches:
            moved = decode_bytes(config, batch, context, "bfloat16")
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "dense_gb": itemsize * _dense(config) / 1e9,
                    "experts_gb": itemsize * _experts(config, batch, None) / 1e9,
                    "kv_gb": _kv(config, batch, context, itemsize) / 1e9,
                    "gflop": decode_flops(config, batch, context) / 1e9,
                    **{card: 1e3 * moved / facts.bandwidth for card, facts in CARDS.items()},
                }
            )
    return rows
