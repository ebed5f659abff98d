"""The demo model's shape, as the `config.json` it ships with."""

from __future__ import annotations

from typing import Any

from emoe_jax.config import ModelConfig
from emoe_jax.models import config_from_hf

VOCAB_SIZE = 4096
MAX_LENGTH = 1024


def hf_config(**changes: Any) -> dict[str, Any]:
    """`config.json` of the demo model: Mixtral, 8 layers of 32 experts, top-4. Keyword arguments replace entries."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-5,
        "use_cache": True,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "num_experts_per_tok": 4,
        "num_local_experts": 32,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.01,
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
        **changes,
    }


def model_config(**changes: Any) -> ModelConfig:
    return config_from_hf(hf_config(**changes))
