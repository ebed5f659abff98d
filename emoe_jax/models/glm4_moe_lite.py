"""GLM-4 MoE Lite (GLM-4.7-Flash): DeepSeek-V3's attention and router, and a list of which layers are dense."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from emoe_jax.checkpoint.family import Family
from emoe_jax.config import LatentConfig, ModelConfig
from emoe_jax.errors import ConfigError
from emoe_jax.models.deepseek_v3 import noaux_router
from emoe_jax.models.hf_config import HfConfig
from emoe_jax.models.hf_latent import ALIASES, latent_decoder
from emoe_jax.models.tensors import decoder_tensors, expert_sources, is_of_layers_behind

_SIZES = LatentConfig(kv_rank=512, rope_dim=64, nope_dim=192, value_dim=256, q_rank=768)


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    hf = HfConfig("glm4_moe_lite", raw, aliases=ALIASES, formats=("fp8",))
    interleaved = hf.get("rope_interleave", bool, True)
    decoder = latent_decoder(hf, _SIZES, norm_eps=1e-5, max_position=202752, interleaved=interleaved)
    num_experts = hf.size("n_routed_experts", 64)
    expert_hidden = hf.size("moe_intermediate_size", 1536)
    config = ModelConfig(
        **decoder,
        num_experts=num_experts,
        top_k=hf.top_k(num_experts, 4),
        expert_hidden=expert_hidden,
        dense_hidden=hf.size("intermediate_size", 10240),
        shared_expert_hidden=expert_hidden * hf.size("n_shared_experts", 1),
        moe_layers=_sparse_layers(hf, decoder["num_layers"]),
        router=noaux_router(hf, groups=1, chosen_groups=1, scale=1.8),
        bos_token_id=hf.token_id("bos_token_id", 0),
        eos_token_ids=hf.token_ids("eos_token_id", 1),
        pad_token_id=hf.token_id("pad_token_id"),
    )
    hf.finish()
    return config


def _sparse_layers(hf: HfConfig, layers: int) -> tuple[int, ...]:
    """Layers with experts: as `mlp_layer_types` says, else all but the first.

    `first_k_dense_replace`, which published files have and transformers does not read, must agree.
    """
    kinds = hf.get("mlp_layer_types", list, ["dense"] + ["sparse"] * (layers - 1))
    if len(kinds) != layers or any(kind not in ("dense", "sparse") for kind in kinds):
        raise ConfigError(f"config.json: mlp_layer_types is {kinds!r}; expected dense or sparse for {layers} layers")
    sparse = tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse")
    dense = layers - len(sparse)
    if sparse == tuple(range(dense, layers)):
        hf.must_be("first_k_dense_replace", dense)
    else:
        hf.must_be("first_k_dense_replace")
    return sparse


GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    model_types=("glm4_moe_lite",),
    architectures=("Glm4MoeLiteForCausalLM",),
    config=_config,
    dense_tensors=partial(decoder_tensors, shared_expert="mlp.shared_experts"),
    expert_sources=expert_sources,
    ignored=is_of_layers_behind,
    reasoning="think",
    calls="glm",
)
