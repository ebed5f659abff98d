"""Mixtral (8x7B, 8x22B, TinyMixtral): every layer has experts, the top-k probabilities are renormalised."""

from collections.abc import Mapping
from typing import Any

from emoe_jax.config import ModelConfig
from emoe_jax.models.family import (
    DenseTensors,
    ExpertSource,
    Family,
    HfConfig,
    Part,
    attention_tensors,
    fused_source,
    outer_tensors,
    per_expert_source,
)


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    hf = HfConfig("mixtral", raw)
    layers, heads, hidden = hf.size("num_hidden_layers"), hf.size("num_attention_heads"), hf.size("hidden_size")
    max_position = hf.size("max_position_embeddings", 4096 * 32)
    head_dim = hf.size("head_dim", hidden // heads)
    window = hf.get("sliding_window", int)
    hf.ignore("router_jitter_noise")  # training only
    config = ModelConfig(
        family="mixtral",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=hf.size("num_key_value_heads", heads),
        head_dim=head_dim,
        max_position=max_position,
        num_experts=hf.size("num_local_experts", 8),
        top_k=hf.size("num_experts_per_tok", 2),
        expert_hidden=hf.size("intermediate_size"),
        moe_layers=tuple(range(layers)),
        norm_eps=hf.number("rms_norm_eps", 1e-5),
        rope=hf.rope(max_position, default_theta=1e6),
        attention_scale=head_dim**-0.5,
        sliding_windows=(window,) * layers,
        activation=hf.activation(),
        norm_topk_prob=True,
        tie_embeddings=hf.get("tie_word_embeddings", bool, False),
        bos_token_id=hf.token_id("bos_token_id"),
        eos_token_ids=hf.token_ids("eos_token_id"),
        pad_token_id=hf.token_id("pad_token_id"),
        dtype=hf.dtype,
    )
    hf.finish()
    return config


def _dense_tensors(config: ModelConfig) -> DenseTensors:
    tensors = outer_tensors(config)
    router_shape = (config.num_experts, config.hidden_size)
    for layer in range(config.num_layers):
        tensors |= attention_tensors(config, layer)
        router = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        tensors[f"layers.{layer}.router.weight"] = (Part(router, router_shape),)
    return tensors


def _expert_sources(config: ModelConfig, layer: int, expert: int) -> tuple[ExpertSource, ...]:
    hub = f"model.layers.{layer}"
    return (
        per_expert_source(config, f"{hub}.block_sparse_moe.experts.{expert}", ("w1", "w3", "w2")),
        fused_source(config, f"{hub}.mlp.experts", expert),
    )


MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    architectures=("MixtralForCausalLM",),
    config=_config,
    dense_tensors=_dense_tensors,
    expert_sources=_expert_sources,
    aliases={".mlp.gate.weight": ".block_sparse_moe.gate.weight"},  # transformers 5, saved unconverted
)
