"""DeepSeek-V2 (V2, V2-Lite, Coder-V2): latent attention, a softmax router whose groups rank by their best expert, a
shared expert that every token passes, dense first layers."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from emoe_jax.checkpoint.family import Family
from emoe_jax.config import LatentConfig, ModelConfig, RouterConfig
from emoe_jax.models.hf_config import HfConfig
from emoe_jax.models.hf_latent import ALIASES, latent_decoder
from emoe_jax.models.tensors import decoder_tensors, expert_sources, is_of_layers_behind

_SIZES = LatentConfig(kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128, q_rank=1536)


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    hf = HfConfig("deepseek_v2", raw, aliases=ALIASES, formats=("fp8",))
    hf.must_be("rope_interleave", True)
    decoder = latent_decoder(hf, _SIZES, norm_eps=1e-6, max_position=2048, interleaved=True)
    hf.must_be("scoring_func", "softmax")
    hf.must_be("topk_method", "greedy", "group_limited_greedy")
    hf.must_be("norm_topk_prob", False)  # DeepSeek's code and transformers' differ in what True means
    groups, chosen = hf.size("n_group", 1), hf.size("topk_group", 1)
    if hf.get("topk_method", str, "greedy") == "greedy":
        groups = chosen = 1
    num_experts = hf.size("n_routed_experts", 64)
    expert_hidden = hf.size("moe_intermediate_size", 1407)
    config = ModelConfig(
        **decoder,
        num_experts=num_experts,
        top_k=hf.top_k(num_experts, 6),
        expert_hidden=expert_hidden,
        dense_hidden=hf.size("intermediate_size", 11008),
        shared_expert_hidden=expert_hidden * hf.size("n_shared_experts", 2),
        moe_layers=tuple(range(hf.count("first_k_dense_replace", 0), decoder["num_layers"])),
        router=RouterConfig(
            norm_topk_prob=False,
            scale=hf.positive("routed_scaling_factor", 1.0),
            groups=groups,
            chosen_groups=chosen,
            group_rank="best",
        ),
        bos_token_id=hf.token_id("bos_token_id", 1),
        eos_token_ids=hf.token_ids("eos_token_id", 2),
        pad_token_id=hf.token_id("pad_token_id"),
    )
    hf.finish()
    return config


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    model_types=("deepseek_v2",),
    architectures=("DeepseekV2ForCausalLM",),
    config=_config,
    dense_tensors=partial(decoder_tensors, shared_expert="mlp.shared_experts"),
    expert_sources=expert_sources,
    ignored=is_of_layers_behind,
)
