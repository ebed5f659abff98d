"""The keys of `config.json` that the families of latent attention have in common."""

import dataclasses
from typing import Any

from emoe_jax.config import LatentConfig
from emoe_jax.models.hf_config import HfConfig

ALIASES = {"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"}
"""Names that transformers 5 saves."""


def latent_decoder(
    hf: HfConfig, defaults: LatentConfig, norm_eps: float, max_position: int, interleaved: bool
) -> dict[str, Any]:
    """The fields of `ModelConfig` that describe attention, and those that all Llama-like families spell alike.

    `defaults` are a family's sizes, and `interleaved` says whether neighbours are rotated together.
    """
    heads = hf.size("num_attention_heads")
    latent = LatentConfig(
        kv_rank=hf.size("kv_lora_rank", defaults.kv_rank),
        rope_dim=hf.size("qk_rope_head_dim", defaults.rope_dim),
        nope_dim=hf.size("qk_nope_head_dim", defaults.nope_dim),
        value_dim=hf.size("v_head_dim", defaults.value_dim),
        q_rank=hf.optional_size("q_lora_rank", defaults.q_rank),
    )
    hf.must_be("num_key_value_heads", heads)
    hf.must_be("head_dim", latent.rope_dim)  # what transformers means by it, and saves
    hf.must_be("qk_head_dim", latent.nope_dim + latent.rope_dim)
    decoder = hf.decoder(norm_eps, max_position, head_dim=latent.rope_dim)
    hf.same_attention(decoder["num_layers"], None)
    hf.ignore("num_nextn_predict_layers", "num_mtp_layers")  # layers behind the model that guess tokens ahead
    hf.ignore("aux_loss_alpha", "seq_aux")  # of training
    bias = hf.get("attention_bias", bool, False)
    rope = dataclasses.replace(decoder["rope"], interleaved=interleaved)
    return decoder | {
        "latent": latent,
        "num_kv_heads": 1,
        "head_dim": latent.key_dim,
        "rope": rope,
        "attention_scale": (latent.nope_dim + latent.rope_dim) ** -0.5 * rope.all_dim_factor**2,
        "qkv_bias": bias,
        "output_bias": bias,
    }
