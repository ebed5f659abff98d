"""Qwen3-MoE: norms on each q and k head, dense layers in between, optional sliding window on every layer."""

from collections.abc import Mapping
from typing import Any

from emoe_jax.checkpoint.family import Family
from emoe_jax.config import ModelConfig, RouterConfig
from emoe_jax.models.hf_config import HfConfig
from emoe_jax.models.tensors import decoder_tensors, expert_sources


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    names = {"num_local_experts": "num_experts"}  # transformers 5 saves the former
    hf = HfConfig("qwen3_moe", raw, aliases=names, formats=("fp8",))
    decoder = hf.decoder(norm_eps=1e-6, max_position=32768)
    layers = decoder["num_layers"]
    bias = hf.get("attention_bias", bool, False)
    window = sliding_window(hf)
    hf.same_attention(layers, window)
    for key in ("qk_norm", "use_qk_norm"):
        hf.must_be(key, True)
    hf.ignore("max_window_layers")  # written by transformers 4, which did not read it either
    num_experts = hf.size("num_experts", 128)
    config = ModelConfig(
        **decoder,
        num_kv_heads=hf.kv_heads(decoder["num_heads"], default=4),
        num_experts=num_experts,
        top_k=hf.top_k(num_experts, 8),
        expert_hidden=hf.size("moe_intermediate_size", 768),
        dense_hidden=hf.size("intermediate_size", 6144),
        moe_layers=sparse_layers(hf, layers),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        sliding_windows=(window,) * layers,
        router=RouterConfig(norm_topk_prob=hf.get("norm_topk_prob", bool, False)),
        bos_token_id=hf.token_id("bos_token_id"),
        eos_token_ids=hf.token_ids("eos_token_id"),
        pad_token_id=hf.token_id("pad_token_id"),
    )
    hf.finish()
    return config


def sparse_layers(hf: HfConfig, layers: int) -> tuple[int, ...]:
    """Layers with experts: every `decoder_sparse_step`-th, except those of `mlp_only_layers`."""
    step = hf.size("decoder_sparse_step", 1)
    dense = hf.indices("mlp_only_layers", layers)
    return tuple(layer for layer in range(layers) if (layer + 1) % step == 0 and layer not in dense)


def sliding_window(hf: HfConfig) -> int | None:
    """`sliding_window`, which counts only with `use_sliding_window`; configs keep a value that is switched off."""
    if hf.get("use_sliding_window", bool, False):
        return hf.optional_size("sliding_window", 4096)
    hf.ignore("sliding_window")
    return None


QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    config=_config,
    dense_tensors=decoder_tensors,
    expert_sources=expert_sources,
    reasoning="think",
)
