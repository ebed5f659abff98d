"""DeepSeek-V3 (V3, R1, V3.1): latent attention, a sigmoid router with groups and a bias of the choice, a shared expert
that every token passes, dense first layers."""

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
    hf = HfConfig("deepseek_v3", raw, aliases=ALIASES, formats=("fp8",))
    interleaved = hf.get("rope_interleave", bool, True)
    decoder = latent_decoder(hf, _SIZES, norm_eps=1e-6, max_position=4096, interleaved=interleaved)
    num_experts = hf.size("n_routed_experts", 256)
    expert_hidden = hf.size("moe_intermediate_size", 2048)
    config = ModelConfig(
        **decoder,
        num_experts=num_experts,
        top_k=hf.top_k(num_experts, 8),
        expert_hidden=expert_hidden,
        dense_hidden=hf.size("intermediate_size", 18432),
        shared_expert_hidden=expert_hidden * hf.size("n_shared_experts", 1),
        moe_layers=tuple(range(hf.count("first_k_dense_replace", 3), decoder["num_layers"])),
        router=noaux_router(hf, groups=8, chosen_groups=4, scale=2.5),
        bos_token_id=hf.token_id("bos_token_id", 0),
        eos_token_ids=hf.token_ids("eos_token_id", 1),
        pad_token_id=hf.token_id("pad_token_id"),
    )
    hf.finish()
    return config


def noaux_router(hf: HfConfig, groups: int, chosen_groups: int, scale: float) -> RouterConfig:
    """The router that DeepSeek calls `noaux_tc`; arguments are a family's defaults."""
    hf.must_be("scoring_func", "sigmoid")
    hf.must_be("topk_method", "noaux_tc")
    return RouterConfig(
        score="sigmoid",
        norm_topk_prob=hf.get("norm_topk_prob", bool, True),
        scale=hf.positive("routed_scaling_factor", scale),
        choice_bias=True,
        groups=hf.size("n_group", groups),
        chosen_groups=hf.size("topk_group", chosen_groups),
    )


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3",),
    architectures=("DeepseekV3ForCausalLM",),
    config=_config,
    dense_tensors=partial(decoder_tensors, shared_expert="mlp.shared_experts"),
    expert_sources=expert_sources,
    ignored=is_of_layers_behind,
)
