"""The least that a decode step can take: the bytes that it must read, over the bandwidth of a card.

`python -m benchmarks.verify_gpu --floors` prints the table of `docs/explanation/gpu.md`.
"""

from __future__ import annotations

from typing import Any

from benchmarks.memory.geometries import GEOMETRIES
from emoe_jax.config import ModelConfig
from emoe_jax.models import config_from_hf
from emoe_jax.planning.roofline import Roofline, Work
from emoe_jax.planning.targets import Target

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


CARDS = {"RTX 4090": "rtx4090", "A100 80 GB": "a100-80gb", "H100 80 GB": "h100-80gb"}
"""Columns of the table, and what the planner calls these cards."""


def decode_work(config: ModelConfig, batch: int, context: int, dtype: str, slots: int | None = None) -> Work:
    """Of one decode step of `batch` sequences of `context` tokens. With `slots` the routers choose among so many."""
    return Roofline(config, dtype, dtype, slots or config.num_experts).decode(batch, context, coverage=1.0)


def decode_bytes(config: ModelConfig, batch: int, context: int, dtype: str, slots: int | None = None) -> float:
    """What such a step reads: weights once, keys and values once."""
    return decode_work(config, batch, context, dtype, slots).memory_bytes


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
        for batch in batches:
            work = decode_work(config, batch, context, "bfloat16")
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "dense_gb": work.dense_bytes / 1e9,
                    "experts_gb": work.expert_bytes / 1e9,
                    "kv_gb": work.kv_bytes / 1e9,
                    "gflop": work.operations / 1e9,
                    **{
                        column: 1e3 * work.memory_bytes / Target.of_card(card, efficiency=1.0).bandwidth
                        for column, card in CARDS.items()
                    },
                }
            )
    return rows
