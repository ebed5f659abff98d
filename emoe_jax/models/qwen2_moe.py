"""Qwen2-MoE: a gated shared expert beside the routed ones, biases on q, k and v, a sliding window on some layers."""

from collections.abc import Mapping
from typing import Any

from emoe_jax.checkpoint.family import Family
from emoe_jax.config import ModelConfig, RouterConfig
from emoe_jax.errors import ConfigError
from emoe_jax.models.hf_config import HfConfig
from emoe_jax.models.qwen3_moe import sliding_window, sparse_layers
from emoe_jax.models.tensors import decoder_tensors, expert_sources


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    hf = HfConfig("qwen2_moe", raw)
    decoder = hf.decoder(norm_eps=1e-6, max_position=32768)
    layers = decoder["num_layers"]
    num_experts = hf.size("num_experts", 60)
    config = ModelConfig(
        **decoder,
        num_kv_heads=hf.kv_heads(decoder["num_heads"], default=16),
        num_experts=num_experts,
        top_k=hf.top_k(num_experts, 4),
        expert_hidden=hf.size("moe_intermediate_size", 1408),
        dense_hidden=hf.size("intermediate_size", 5632),
        shared_expert_hidden=hf.size("shared_expert_intermediate_size", 5632),
        shared_expert_gate=True,
        moe_layers=sparse_layers(hf, layers),
        qkv_bias=hf.get("qkv_bias", bool, True),
        sliding_windows=_windows(hf, layers),
        router=RouterConfig(norm_topk_prob=hf.get("norm_topk_prob", bool, False)),
        bos_token_id=hf.token_id("bos_token_id"),
        eos_token_ids=hf.token_ids("eos_token_id"),
        pad_token_id=hf.token_id("pad_token_id"),
    )
    hf.finish()
    return config


def _windows(hf: HfConfig, layers: int) -> tuple[int | None, ...]:
    """The window of each layer: where `layer_types` says so, else (as transformers has it) every other layer.

    Without `layer_types` it is the even layers below `max_window_layers`. No published model switches windows on.
    """
    window = sliding_window(hf)
    limit = hf.get("max_window_layers", int, 28)
    slides = [window is not None and layer % 2 == 0 and layer < limit for layer in range(layers)]
    kinds = hf.layer_kinds(layers, [f"{'sliding' if slide else 'full'}_attention" for slide in slides])
    if "sliding_attention" in kinds and window is None:
        raise ConfigError("config.json: layer_types has sliding_attention, but use_sliding_window is off")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


QWEN2_MOE = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    architectures=("Qwen2MoeForCausalLM",),
    config=_config,
    dense_tensors=decoder_tensors,
    expert_sources=expert_sources,
)
