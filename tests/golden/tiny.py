"""Tiny configurations that between them switch every option of each family, and weights made from a tensor's name."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from emoe_jax.checkpoint.family import Part
from emoe_jax.models import config_from_hf, family_of
from tests.golden.latent import LATENT

_SHARED = {"vocab_size": 96, "hidden_size": 40, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}

_MIXTRAL = _SHARED | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}
_OLMOE = _SHARED | {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "pad_token_id": 3,
}
_QWEN2 = _SHARED | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 28,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}
_QWEN3 = _SHARED | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}
_GLM4 = _SHARED | {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}
_GRANITE = _SHARED | {
    "architectures": ["GraniteMoeForCausalLM"],
    "model_type": "granitemoe",
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}
_GPT_OSS = _SHARED | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # Grouped kv heads, a head size of its own, sliding window.
    "mixtral_window": _MIXTRAL | {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 7, "rope_theta": 1e4},
    # One kv head per query head, tied embeddings, scaled rotary frequencies, another activation.
    "mixtral_llama3": _MIXTRAL
    | {
        "num_key_value_heads": 4,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
        "rope_parameters": _LLAMA3,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-3,
    },
    "mixtral_yarn": _MIXTRAL
    | {
        "num_key_value_heads": 1,
        "head_dim": 10,
        "rope_theta": 1000.0,
        "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0},
        "sliding_window": None,
        "hidden_act": "gelu",
    },
    "olmoe_plain": _OLMOE
    | {"num_key_value_heads": 4, "rope_scaling": {"type": "linear", "factor": 2.5}, "tie_word_embeddings": True},
    # Biases everywhere in attention, clipped projections, renormalised weights, grouped kv heads.
    "olmoe_options": _OLMOE
    | {"num_key_value_heads": 2, "attention_bias": True, "clip_qkv": 0.9, "norm_topk_prob": True},
    # Explicit layer types, dense layers from both rules, renormalised weights.
    "qwen2_windows": _QWEN2
    | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    # The window rule of configurations that have no layer types.
    "qwen2_old_windows": _QWEN2
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "tie_word_embeddings": True},
    "qwen2_yarn": _QWEN2
    | {
        "qkv_bias": False,
        "decoder_sparse_step": 2,
        "num_key_value_heads": 4,
        "sliding_window": 6,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.8,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
    },
    # Head size that differs from hidden / heads, biases, dense layers in between, window everywhere.
    "qwen3_window": _QWEN3
    | {
        "head_dim": 12,
        "attention_bias": True,
        "norm_topk_prob": True,
        "mlp_only_layers": [0, 3],
        "use_sliding_window": True,
        "sliding_window": 6,
    },
    "qwen3_tied": _QWEN3
    | {
        "head_dim": 8,
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
        "norm_topk_prob": False,
        "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.3},
        "max_window_layers": 2,
    },
    # Groups, scaled weights, biases and norms in attention, two shared experts in one, half of each head rotated.
    "glm4_groups": _GLM4
    | {
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "n_shared_experts": 2,
        "first_k_dense_replace": 2,
        "attention_bias": True,
        "use_qk_norm": True,
        "head_dim": 12,
        "rope_theta": 1e4,
    },
    # Raw sigmoids as weights, another fraction of a head, YaRN over it, no dense layer, tied embeddings.
    "glm4_raw": _GLM4
    | {
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "head_dim": 16,
        "partial_rotary_factor": 0.25,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.75,
        },
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 1,
    },
    # Every multiplier, biases in attention, grouped kv heads.
    "granite_multipliers": _GRANITE
    | {
        "num_key_value_heads": 2,
        "attention_bias": True,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 5.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 1.5,
    },
    # No multiplier but that of attention, tied embeddings, one kv head per query head, scaled rotary frequencies.
    "granite_plain": _GRANITE
    | {
        "num_experts_per_tok": 3,
        "attention_multiplier": 0.3,
        "tie_word_embeddings": True,
        "rope_parameters": _LLAMA3,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-3,
    },
    # YaRN without truncation, windows on the first and the third layer, a head size of its own, a limit that cuts.
    "gpt_oss_windows": _GPT_OSS
    | {
        "head_dim": 12,
        "sliding_window": 6,
        "swiglu_limit": 0.8,
        "rope_theta": 1000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 8.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    # Explicit layer types, no biases in attention, another alpha, the usual rotary frequencies, tied embeddings.
    "gpt_oss_options": _GPT_OSS
    | {
        "head_dim": 10,
        "num_experts_per_tok": 3,
        "sliding_window": 5,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "attention_bias": False,
        "swiglu_alpha": 1.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "tie_word_embeddings": True,
    },
} | LATENT

OPENMOE: dict[str, Any] = {
    "architectures": ["OpenMoeForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 24,
    "head_dim": 12,
    "hidden_act": "swiglu",
    "max_position_embeddings": 64,
    "mlp_gated": True,
    "moe_layer_interval": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_hidden_layers": 4,
    "router_topk": 2,
    "router_capacity_factor_eval": 2.0,
    "router_min_capacity": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

Layout = Literal["per_expert", "fused"]


def random_tensors(raw: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint with one tensor per expert where it can be; each depends on its name alone."""
    return {part.name: random_tensor(part.name, part.shape) for part in _parts(raw)}


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norms around 1; projections scaled to keep activations and logits of the order of 1."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    numbers = np.random.default_rng(seed).standard_normal(shape)
    if "norm" in name:
        return (1 + 0.2 * numbers).astype(np.float32)
    scale = 0.3 if len(shape) == 1 else 1.4 / np.sqrt(shape[-1])
    if ".q_proj." in name:
        scale *= 0.5  # sharp attention, and OpenMoE's is not scaled down, would amplify rounding
    return (scale * numbers).astype(np.float32)


def _parts(raw: Mapping[str, Any]) -> Iterator[Part]:
    config, family = config_from_hf(dict(raw)), family_of(raw)
    for parts in family.dense_tensors(config).values():
        yield from parts
    for layer in config.moe_layers:
        for expert in range(config.num_experts):
            sources = family.expert_sources(config, layer, expert)
            separate = [source for source in sources if source.w_out.index is None]
            yield from (separate or sources)[0].parts


def fuse(raw: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same model as transformers 5 saves it with `save_original_format=False` (OpenMoE: as it is on the hub)."""
    if "OpenMoeForCausalLM" in raw["architectures"]:
        return _fuse_openmoe(tensors)
    if "GraniteMoeForCausalLM" in raw["architectures"]:
        return {_granite_name(name): value for name, value in tensors.items()}
    fused: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    projection = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for name, value in tensors.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            fused[name] = value
            continue
        stack, expert, kind = match.groups()
        stacks.setdefault(stack, {}).setdefault(int(expert), {})[projection.get(kind, kind)] = value
    for stack, experts in stacks.items():
        ordered = [experts[e] for e in range(len(experts))]
        fused[f"{stack}.gate_up_proj"] = np.stack([np.concatenate([e["gate_proj"], e["up_proj"]]) for e in ordered])
        fused[f"{stack}.down_proj"] = np.stack([e["down_proj"] for e in ordered])
    return fused


def _granite_name(published: str) -> str:
    names = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj"}
    names["router.layer.weight"] = "router.weight"
    for ending, name in names.items():
        if published.endswith(ending):
            return published.removesuffix(ending) + name
    return published


def _fuse_openmoe(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    fused: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    projection = {"gate_proj": "wi_gate", "up_proj": "wi_up", "down_proj": "wo"}
    for name, value in tensors.items():
        match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            fused[name] = value
            continue
        stack, expert, kind = match.groups()
        stacks.setdefault(f"{stack}.{projection[kind]}", {})[int(expert)] = value.T
    return fused | {name: np.stack([experts[e] for e in range(len(experts))]) for name, experts in stacks.items()}


def write_checkpoint(
    directory: Path,
    raw: Mapping[str, Any],
    layout: Layout = "per_expert",
    dtype: Any = np.float32,
    shards: int = 1,
) -> Path:
    """A checkpoint directory written without any code of the library's own writer."""
    tensors = random_tensors(raw)
    if layout == "fused":
        tensors = fuse(raw, tensors)
    tensors = {name: np.ascontiguousarray(value.astype(dtype)) for name, value in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(raw)))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[number::shards]
        save_file({name: tensors[name] for name in mine}, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def prompts(raw: Mapping[str, Any], length: int = 16) -> np.ndarray:
    """Two sequences of token ids."""
    ids = np.random.default_rng(7).integers(3, raw["vocab_size"], (2, length))
    return ids.astype(np.int32)
