"""OpenMoE (base, 8B, 34B; Xue et al.): umT5 flavoured decoder with experts in every `moe_layer_interval`-th layer.

What sets it apart: no 1/sqrt(H) on attention scores, FFNs that are gated twice, raw top-k probabilities, and a dense
FFN with its own norm after each MoE sum. The published model also drops tokens over an expert's capacity, which makes
its output depend on batch and padding; here that is off unless `router_capacity_factor` is set (published: 2.0).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from emoe_jax.checkpoint.family import ExpertSource, Family, Part
from emoe_jax.config import ModelConfig, RopeConfig, RouterConfig
from emoe_jax.errors import ConfigError
from emoe_jax.models.hf_config import HfConfig
from emoe_jax.models.tensors import decoder_tensors, per_expert_source

_BOS = 0  # the pad token's id; its embedding row is trained
_EOS = 1

_SHORT_NAMES = {
    "topk": "router_topk",
    "capacity_factor_train": "router_capacity_factor_train",
    "capacity_factor_eval": "router_capacity_factor_eval",
    "min_capacity": "router_min_capacity",
    "noisy_policy": "router_noisy_policy",
    "drop_tks": "router_drop_tks",
    "gated": "mlp_gated",
}

# Training losses, parallelism and kernels; and options that the published code carries but never reads.
_NO_EFFECT = (
    "dropout_rate",
    "enable_comm_overlap",
    "enable_hierarchical_alltoall",
    "enable_kernel",
    "enable_load_balance",
    "expert_parallel",
    "label_smoothing",
    "layer_norm_epsilon",
    "load_balance_beam_width",
    "load_balance_group_swap_factor",
    "load_balance_tolerance",
    "rope_theta",
    "router_aux_loss_factor",
    "router_capacity_factor_train",
    "router_drop_tks",
    "router_z_loss_factor",
    "z_loss_factor",
)


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    hf = HfConfig("openmoe", raw, aliases=_SHORT_NAMES)
    layers, heads, hidden = hf.size("num_hidden_layers"), hf.size("num_attention_heads"), hf.size("hidden_size")
    interval = hf.size("moe_layer_interval")
    num_experts = hf.size("num_experts")
    top_k = hf.top_k(num_experts, 2, key="router_topk")
    if top_k > 2:
        raise ConfigError(f"config.json: router_topk = {top_k} is not supported by openmoe; supported: 1 or 2")
    hf.must_be("hidden_act", "swiglu")
    hf.must_be("mlp_gated", True)
    hf.must_be("attention_bias", False)
    hf.must_be("rope_scaling")
    hf.must_be("router_noisy_policy")
    hf.positive("router_capacity_factor_eval", 2.0)
    hf.ignore(*_NO_EFFECT)
    hf.same_attention(layers, None)
    config = ModelConfig(
        family="openmoe",
        vocab_size=hf.size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=hf.kv_heads(heads),
        head_dim=hf.size("head_dim", max(1, hidden // heads)),
        max_position=hf.size("max_position_embeddings", 2048),
        num_experts=num_experts,
        top_k=top_k,
        expert_hidden=hf.size("intermediate_size"),
        dense_hidden=hf.size("intermediate_size"),
        moe_layers=tuple(range(interval - 1, layers, interval)),
        norm_eps=hf.positive("rms_norm_eps", 1e-6),
        rope=RopeConfig(theta=10000.0),
        attention_scale=1.0,
        ffn="double_glu",
        extra_ffn=True,
        router=RouterConfig(norm_topk_prob=False, min_capacity=hf.size("router_min_capacity", 4)),
        tie_embeddings=hf.get("tie_word_embeddings", bool, False),
        bos_token_id=_BOS,
        eos_token_ids=_eos_ids(hf),
        pad_token_id=hf.token_id("pad_token_id", 0),
        prepend_bos_id=_BOS,
        dtype=hf.dtype,
        expert_format=hf.expert_format,
    )
    hf.finish()
    return config


def _eos_ids(hf: HfConfig) -> tuple[int, ...]:
    """`eos_token_id`; early uploads carried the pair bos 1, eos 2, which their vocabulary contradicts."""
    bos, eos = hf.token_ids("bos_token_id", _BOS), hf.token_ids("eos_token_id", _EOS)
    return (_EOS,) if (bos, eos) == ((1,), (2,)) else eos


def _expert_sources(config: ModelConfig, layer: int, expert: int) -> tuple[ExpertSource, ...]:
    """The published stacks, stored in-by-out; and a community re-save with one tensor per expert."""
    hub = f"model.layers.{layer}.mlp.experts"
    E, D, F = config.num_experts, config.hidden_size, config.expert_hidden
    stacks = ExpertSource(
        (
            Part(f"{hub}.wi_gate", (E, D, 2 * F), expert, transposed=True),
            Part(f"{hub}.wi_up", (E, D, F), expert, transposed=True),
        ),
        Part(f"{hub}.wo", (E, F, D), expert, transposed=True),
    )
    return stacks, per_expert_source(config, f"{hub}.{expert}")


OPENMOE = Family(
    name="openmoe",
    model_types=(),  # its configs say "llama"
    architectures=("OpenMoeForCausalLM",),
    config=_config,
    dense_tensors=partial(decoder_tensors, router="mlp.gate_weight"),
    expert_sources=_expert_sources,
    aliases={".mlp.gate.weight": ".mlp.gate_weight"},  # the community re-save
)
