"""Tiny configurations of the families of latent attention; `tests.golden.tiny` has those of the others."""

from typing import Any

_LATENT = {
    "vocab_size": 96,
    "hidden_size": 40,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
}
_DEEPSEEK_V2 = _LATENT | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
_DEEPSEEK_V3 = _LATENT | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
_GLM4_LITE = _LATENT | {"architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite"}

LATENT: dict[str, dict[str, Any]] = {
    # Groups by their best expert, scaled weights, two shared experts in one, biases, YaRN with both temperatures.
    "deepseek_v2_groups": _DEEPSEEK_V2
    | {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "rope_theta": 1e4,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 8.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
    },
    # Queries without low rank (V2-Lite), groups that a greedy router ignores, no dense layer, tied embeddings.
    "deepseek_v2_lite": _DEEPSEEK_V2
    | {
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 2,
        "first_k_dense_replace": 0,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-3,
    },
    # As published: groups, a bias of the choice, YaRN whose temperature is in the scores alone, dense first layers.
    "deepseek_v3_groups": _DEEPSEEK_V3
    | {
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.7,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "rope_theta": 1e4,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    # Halves rotated together, queries without low rank, biases, raw sigmoids as weights, no groups, tied embeddings.
    "deepseek_v3_halves": _DEEPSEEK_V3
    | {
        "rope_interleave": False,
        "q_lora_rank": None,
        "attention_bias": True,
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3,
    },
    # A list of dense layers, groups, halves rotated together, biases.
    "glm4_lite_layers": _GLM4_LITE
    | {
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "n_group": 2,
        "topk_group": 1,
        "rope_interleave": False,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    # The usual layers, queries without low rank, raw sigmoids as weights, YaRN with one temperature, tied embeddings.
    "glm4_lite_raw": _GLM4_LITE
    | {
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "n_shared_experts": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale_all_dim": 0.6,
        },
    },
}
