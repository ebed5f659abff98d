"""OLMoE: every layer has experts, whole-width q/k norms before the heads are split, raw top-k probabilities."""

from collections.abc import Mapping
from typing import Any

from emoe_jax.checkpoint.family import Family
from emoe_jax.config import ModelConfig, RouterConfig
from emoe_jax.models.hf_config import HfConfig
from emoe_jax.models.tensors import decoder_tensors, expert_sources


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    hf = HfConfig("olmoe", raw, aliases={"num_local_experts": "num_experts"})
    decoder = hf.decoder(norm_eps=1e-5, max_position=4096)
    # The norms over all heads are sized by this quotient, so no other head size exists.
    hf.must_be("head_dim", decoder["hidden_size"] // decoder["num_heads"])
    hf.same_attention(decoder["num_layers"], None)
    for key in ("qk_norm", "use_qk_norm"):
        hf.must_be(key, True)
    if not hf.get("use_sliding_window", bool, True):
        hf.ignore("sliding_window")  # switched off
    hf.must_be("moe_intermediate_size", hf.size("intermediate_size"))
    bias = hf.get("attention_bias", bool, False)
    clip = hf.get("clip_qkv", (int, float))
    num_experts = hf.size("num_experts", 64)
    config = ModelConfig(
        **decoder,
        num_kv_heads=hf.kv_heads(decoder["num_heads"]),
        num_experts=num_experts,
        top_k=hf.top_k(num_experts, 8),
        expert_hidden=hf.size("intermediate_size"),
        moe_layers=tuple(range(decoder["num_layers"])),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="full",
        clip_qkv=None if clip is None else hf.positive("clip_qkv", 1.0),
        router=RouterConfig(norm_topk_prob=hf.get("norm_topk_prob", bool, False)),
        bos_token_id=hf.token_id("bos_token_id"),
        eos_token_ids=hf.token_ids("eos_token_id", 50279),
        pad_token_id=hf.token_id("pad_token_id", 1),
    )
    hf.finish()
    return config


OLMOE = Family(
    name="olmoe",
    model_types=("olmoe",),
    architectures=("OlmoeForCausalLM",),
    config=_config,
    dense_tensors=decoder_tensors,
    expert_sources=expert_sources,
)
