"""gpt-oss (20b, 120b): attention sinks, a window on every other layer, biases everywhere, experts of a clamped GLU.

Gate and up of an expert are stored in turn, row by row: `[in, out]` as floats, and `[out, in]` in MXFP4, as published.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from emoe_jax.checkpoint.family import ExpertSource, Family, Part
from emoe_jax.config import ModelConfig, RouterConfig
from emoe_jax.errors import ConfigError
from emoe_jax.models.hf_config import HfConfig
from emoe_jax.models.tensors import decoder_tensors

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _config(raw: Mapping[str, Any]) -> ModelConfig:
    if not (raw.get("rope_parameters") or raw.get("rope_scaling")):
        raw = {**raw, "rope_parameters": _YARN}
    names = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
    hf = HfConfig("gpt_oss", raw, aliases=names, formats=("mxfp4",))
    hf.must_be("attention_sinks", True)
    decoder = hf.decoder(norm_eps=1e-5, max_position=131072, theta=150000.0, head_dim=64)
    layers = decoder["num_layers"]
    hf.must_be("hidden_act", "silu")
    hf.ignore("initial_context_length")  # as in the rotary scaling, which counts
    bias = hf.get("attention_bias", bool, True)
    num_experts = hf.size("num_local_experts", 128)
    config = ModelConfig(
        **decoder,
        num_kv_heads=hf.kv_heads(decoder["num_heads"], default=8),
        num_experts=num_experts,
        top_k=hf.top_k(num_experts, 4),
        expert_hidden=hf.size("intermediate_size", 2880),
        expert_bias=True,
        moe_layers=tuple(range(layers)),
        qkv_bias=bias,
        output_bias=bias,
        attention_sinks=True,
        sliding_windows=_windows(hf, layers),
        ffn="clamped_glu",
        glu_alpha=hf.positive("swiglu_alpha", 1.702),
        glu_limit=hf.positive("swiglu_limit", 7.0),
        router=RouterConfig(bias=True),
        bos_token_id=hf.token_id("bos_token_id"),
        eos_token_ids=hf.token_ids("eos_token_id"),
        pad_token_id=hf.token_id("pad_token_id"),
    )
    hf.finish()
    return config


def _windows(hf: HfConfig, layers: int) -> tuple[int | None, ...]:
    """The window of each layer: of the first, the third and so on, where `layer_types` does not say otherwise."""
    window = hf.optional_size("sliding_window", 128)
    usual = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    kinds = hf.layer_kinds(layers, usual)
    if "sliding_attention" in kinds and window is None:
        raise ConfigError("config.json: layer_types has sliding_attention, but sliding_window is null")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _expert_sources(config: ModelConfig, layer: int, expert: int) -> tuple[ExpertSource, ...]:
    hub = f"model.layers.{layer}.mlp.experts"
    E, D, F = config.num_experts, config.hidden_size, config.expert_hidden
    return (
        ExpertSource(
            (Part(f"{hub}.gate_up_proj", (E, D, 2 * F), expert, transposed=True, turns=2),),
            Part(f"{hub}.down_proj", (E, F, D), expert, transposed=True),
            (
                Part(f"{hub}.gate_up_proj_bias", (E, 2 * F), expert, turns=2),
                Part(f"{hub}.down_proj_bias", (E, D), expert),
            ),
        ),
    )


GPT_OSS = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    architectures=("GptOssForCausalLM",),
    config=_config,
    dense_tensors=partial(decoder_tensors, router="mlp.router.weight"),
    expert_sources=_expert_sources,
    reasoning="harmony",
    calls="harmony",
)
