"""Mixtral (8x7B, 8x22B, TinyMixtral): every layer has experts, the top-k probabilities are renormalised."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from emoe_jax.checkpoint.family import ExpertSource, Family
from emoe_jax.config import ModelConfig
from emoe_jax.models.hf_config import HfConfig
from emoe_jax.models.tensors import decoder_tensors, fused_source, per_expert_source


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    hf = HfConfig("mixtral", raw, aliases={"num_experts": "num_local_experts"})
    decoder = hf.decoder(norm_eps=1e-5, max_position=4096 * 32, theta=1e6)
    layers = decoder["num_layers"]
    window = hf.window()
    hf.same_attention(layers, window)
    hf.must_be("norm_topk_prob", True)
    hf.must_be("moe_intermediate_size", hf.size("intermediate_size"))
    hf.ignore("router_jitter_noise")  # training only
    num_experts = hf.size("num_local_experts", 8)
    config = ModelConfig(
        **decoder,
        num_kv_heads=hf.kv_heads(decoder["num_heads"], default=8),
        num_experts=num_experts,
        top_k=hf.top_k(num_experts, 2),
        expert_hidden=hf.size("intermediate_size"),
        moe_layers=tuple(range(layers)),
        sliding_windows=(window,) * layers,
        bos_token_id=hf.token_id("bos_token_id", 1),
        eos_token_ids=hf.token_ids("eos_token_id", 2),
        pad_token_id=hf.token_id("pad_token_id"),
    )
    hf.finish()
    return config


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
    dense_tensors=partial(decoder_tensors, router="block_sparse_moe.gate.weight"),
    expert_sources=_expert_sources,
    aliases={".mlp.gate.weight": ".block_sparse_moe.gate.weight"},  # transformers 5, saved unconverted
)
