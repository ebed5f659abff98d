"""GLM-4 MoE (GLM-4.5, 4.6, 4.5-Air): a sigmoid router with groups and a bias of the choice, a shared expert that every
token passes, dense first layers, heads that are rotated in part."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from emoe_jax.checkpoint.family import Family
from emoe_jax.config import ModelConfig, RouterConfig
from emoe_jax.models.hf_config import HfConfig
from emoe_jax.models.tensors import decoder_tensors, expert_sources, is_of_layers_behind


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    names = {"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"}
    hf = HfConfig("glm4_moe", raw, aliases=names, formats=("fp8",))
    decoder = hf.decoder(norm_eps=1e-5, max_position=131072, rotated_part=0.5)
    layers = decoder["num_layers"]
    hf.same_attention(layers, None)
    hf.must_be("scoring_func", "sigmoid")
    hf.must_be("topk_method", "noaux_tc")
    hf.ignore("num_nextn_predict_layers", "num_mtp_layers")  # layers behind the model that guess tokens ahead
    num_experts = hf.size("n_routed_experts", 128)
    expert_hidden = hf.size("moe_intermediate_size", 1408)
    config = ModelConfig(
        **decoder,
        num_kv_heads=hf.kv_heads(decoder["num_heads"], default=8),
        num_experts=num_experts,
        top_k=hf.top_k(num_experts, 8),
        expert_hidden=expert_hidden,
        dense_hidden=hf.size("intermediate_size", 10944),
        shared_expert_hidden=expert_hidden * hf.size("n_shared_experts", 1),
        moe_layers=tuple(range(hf.count("first_k_dense_replace", 1), layers)),
        qkv_bias=hf.get("attention_bias", bool, False),
        qk_norm="head" if hf.get("use_qk_norm", bool, False) else "none",
        router=RouterConfig(
            score="sigmoid",
            norm_topk_prob=hf.get("norm_topk_prob", bool, True),
            scale=hf.positive("routed_scaling_factor", 1.0),
            choice_bias=True,
            groups=hf.size("n_group", 1),
            chosen_groups=hf.size("topk_group", 1),
        ),
        bos_token_id=hf.token_id("bos_token_id"),
        eos_token_ids=hf.token_ids("eos_token_id"),
        pad_token_id=hf.token_id("pad_token_id"),
    )
    hf.finish()
    return config


GLM4_MOE = Family(
    name="glm4_moe",
    model_types=("glm4_moe",),
    architectures=("Glm4MoeForCausalLM",),
    config=_config,
    dense_tensors=partial(decoder_tensors, shared_expert="mlp.shared_experts"),
    expert_sources=expert_sources,
    ignored=is_of_layers_behind,
    reasoning="think",
    calls="glm",
)
