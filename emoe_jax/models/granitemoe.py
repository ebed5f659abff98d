"""Granite MoE (Granite 3.0 and 3.1, 1B-A400M and 3B-A800M): Mixtral with multipliers on embedding, residuals, attention
scores and logits, and experts that are stored as stacks only."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from emoe_jax.checkpoint.family import ExpertSource, Family
from emoe_jax.config import ModelConfig
from emoe_jax.models.hf_config import HfConfig
from emoe_jax.models.tensors import decoder_tensors, fused_source


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    hf = HfConfig("granitemoe", raw, aliases={"num_experts": "num_local_experts"})
    decoder = hf.decoder(norm_eps=1e-6, max_position=2048)
    decoder["attention_scale"] = hf.positive("attention_multiplier", 1.0)
    layers = decoder["num_layers"]
    hf.same_attention(layers, None)
    hf.must_be("norm_topk_prob", True)
    bias = hf.get("attention_bias", bool, False)
    num_experts = hf.size("num_local_experts", 8)
    config = ModelConfig(
        **decoder,
        num_kv_heads=hf.kv_heads(decoder["num_heads"]),
        num_experts=num_experts,
        top_k=hf.top_k(num_experts, 2),
        expert_hidden=hf.size("intermediate_size", 11008),
        moe_layers=tuple(range(layers)),
        qkv_bias=bias,
        output_bias=bias,
        embedding_multiplier=hf.positive("embedding_multiplier", 1.0),
        residual_multiplier=hf.positive("residual_multiplier", 1.0),
        logits_divisor=hf.positive("logits_scaling", 1.0),
        bos_token_id=hf.token_id("bos_token_id", 1),
        eos_token_ids=hf.token_ids("eos_token_id", 2),
        pad_token_id=hf.token_id("pad_token_id"),
    )
    hf.finish()
    return config


def _expert_sources(config: ModelConfig, layer: int, expert: int) -> tuple[ExpertSource, ...]:
    """The stacks of the hub, and those that transformers 5 keeps in memory and can save."""
    hub = f"model.layers.{layer}.block_sparse_moe"
    published = fused_source(config, hub, expert, ("input_linear.weight", "output_linear.weight"))
    return published, fused_source(config, f"{hub}.experts", expert)


GRANITEMOE = Family(
    name="granitemoe",
    model_types=("granitemoe",),
    architectures=("GraniteMoeForCausalLM",),
    config=_config,
    dense_tensors=partial(decoder_tensors, router="block_sparse_moe.router.layer.weight"),
    expert_sources=_expert_sources,
    aliases={".router.weight": ".router.layer.weight"},  # transformers 5, saved unconverted
)
