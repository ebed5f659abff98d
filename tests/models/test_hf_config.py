"""Translation of `config.json`: what each key means, and what is refused by name."""

import functools
import json
import math
import re
from typing import Any

import pytest

from emoe_jax.config import RouterConfig
from emoe_jax.errors import CheckpointError, ConfigError
from emoe_jax.memory.plan import MemoryPlan
from emoe_jax.models import config_from_directory, config_from_hf
from tests.golden.tiny import CONFIGS, OPENMOE
from tests.models.published import GLM_45_AIR, GPT_OSS_20B, MIXTRAL_8X7B, OPENMOE_8B, QWEN3_30B

MIXTRAL = CONFIGS["mixtral_window"]
OLMOE = CONFIGS["olmoe_options"]
QWEN2 = CONFIGS["qwen2_windows"]
QWEN3 = CONFIGS["qwen3_window"]
GLM4 = CONFIGS["glm4_groups"]
GRANITE = CONFIGS["granite_multipliers"]
GPT_OSS = CONFIGS["gpt_oss_windows"]
DEEPSEEK_V2 = CONFIGS["deepseek_v2_groups"]
DEEPSEEK_V3 = CONFIGS["deepseek_v3_groups"]
GLM4_LITE = CONFIGS["glm4_lite_layers"]


def test_mixtral():
    config = config_from_hf(MIXTRAL_8X7B)
    assert (config.head_dim, config.rope.theta, config.dtype) == (128, 1e6, "bfloat16")
    assert config.sliding_window(0) is None
    assert config.eos_token_ids == (2,)
    assert config_from_hf(MIXTRAL).sliding_windows == (7, 7, 7)


def test_absent_and_null_differ_where_transformers_says_so():
    absent = {k: v for k, v in MIXTRAL.items() if k not in ("num_key_value_heads", "eos_token_id")}
    config = config_from_hf(absent | {"num_attention_heads": 16, "eos_token_id": None})
    assert config.num_kv_heads == 8
    assert config.eos_token_ids == ()
    config = config_from_hf(absent | {"num_key_value_heads": None})
    assert config.num_kv_heads == config.num_heads
    assert config.eos_token_ids == (2,)


def test_model_type_serves_where_architectures_is_absent():
    raw = {k: v for k, v in QWEN3.items() if k != "architectures"}
    assert config_from_hf(raw).family == "qwen3_moe"
    with pytest.raises(ConfigError, match="model_type 'llama' is not supported"):
        config_from_hf({"model_type": "llama"})


def test_layers_with_experts():
    assert config_from_hf(QWEN2).moe_layers == (0, 2, 3)
    assert config_from_hf(QWEN2 | {"decoder_sparse_step": 2}).moe_layers == (3,)
    assert config_from_hf(OPENMOE).moe_layers == (1, 3)
    assert config_from_hf(OPENMOE_8B).moe_layers == (5, 11, 17, 23)
    with pytest.raises(ConfigError, match="no MoE layer"):
        config_from_hf(QWEN2 | {"decoder_sparse_step": 9})


def test_qwen_windows():
    without_types = {k: v for k, v in QWEN2.items() if k != "layer_types"}
    assert config_from_hf(QWEN2).sliding_windows == (None, 6, None, 6)
    assert config_from_hf(without_types).sliding_windows == (6, None, 6, None)
    assert config_from_hf(without_types | {"max_window_layers": 2}).sliding_windows == (6, None, None, None)
    off = without_types | {"use_sliding_window": False}
    assert config_from_hf(off).sliding_windows == (None,) * 4
    # transformers 5 writes a window of 0 where it is off.
    assert config_from_hf(off | {"sliding_window": 0}).sliding_windows == (None,) * 4
    assert config_from_hf(QWEN3).sliding_windows == (6,) * 4
    assert config_from_hf(QWEN3 | {"sliding_window": None}).sliding_windows == (None,) * 4


def test_openmoe():
    config = config_from_hf(OPENMOE)
    assert (config.bos_token_id, config.prepend_bos_id, config.eos_token_ids) == (0, 0, (1,))
    assert config.router.capacity_factor is None
    # Early uploads carried ids that their vocabulary contradicts.
    early = config_from_hf(OPENMOE | {"bos_token_id": 1, "eos_token_id": 2})
    assert early == config
    # The published code never reads these.
    assert config_from_hf(OPENMOE | {"rope_theta": 5e5, "layer_norm_epsilon": 1.0}) == config


def test_glm4():
    config = config_from_hf(GLM_45_AIR)
    assert (config.rope.rotated(config.head_dim), config.moe_layers) == (64, tuple(range(1, 46)))
    assert (config.qkv_bias, config.output_bias, config.qk_norm) == (True, False, "none")
    router = RouterConfig(score="sigmoid", choice_bias=True)
    assert config.router == router
    # In `rope_parameters` the factor counts, whatever stands beside.
    inside = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    assert config_from_hf(GLM_45_AIR | {"rope_parameters": inside}).rope.fraction == 0.25


def test_gpt_oss():
    config = config_from_hf(GPT_OSS_20B)
    assert (config.rope.kind, config.rope.truncate, config.max_position) == ("yarn", False, 131072)
    assert config.sliding_windows == (128, None) * 12
    assert (config.ffn, config.glu_limit, config.expert_bias, config.attention_sinks) == (
        "clamped_glu",
        7.0,
        True,
        True,
    )
    assert config.router == RouterConfig(bias=True)
    bare = {key: value for key, value in GPT_OSS_20B.items() if key not in ("rope_scaling", "layer_types")}
    assert config_from_hf(bare) == config


def test_rope_parameters_and_their_older_form_agree():
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32}
    old = MIXTRAL | {"rope_theta": 5e3, "rope_scaling": scaling | {"type": "yarn"}}
    new = {k: v for k, v in MIXTRAL.items() if k != "rope_theta"}
    new |= {"rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": 5e3}}
    assert config_from_hf(old) == config_from_hf(new)
    assert config_from_hf(new).rope.theta == 5e3


def test_keys_of_other_tools_do_not_matter():
    extra = {"max_length": 20, "temperature": 1.0, "pruned_heads": {}, "id2label": {"0": "a"}, "auto_map": {"x": "y"}}
    assert config_from_hf(MIXTRAL | extra) == config_from_hf(MIXTRAL)


REFUSED = [
    (MIXTRAL, {"architectures": ["JambaForCausalLM"]}, "architecture JambaForCausalLM is not supported"),
    (MIXTRAL, {"architectures": "MixtralForCausalLM"}, "architectures is 'MixtralForCausalLM'"),
    (MIXTRAL, {"quantization_config": {"quant_method": "awq"}}, "quantization_config says AWQ, which is not read"),
    (MIXTRAL, {"attention_bias": True}, "option 'attention_bias' is not supported by mixtral"),
    (MIXTRAL, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supported"),
    (MIXTRAL, {"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope' is not supported"),
    (MIXTRAL, {"rope_scaling": {"type": "linear"}}, "rope option 'factor' is missing"),
    (MIXTRAL, {"rope_scaling": {"type": "linear", "factor": 2, "odd": 1}}, "rope option 'odd' is not supported"),
    (MIXTRAL, {"rope_scaling": {"type": "linear", "factor": "two"}}, "rope option 'factor' is 'two'"),
    (MIXTRAL, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope factor is 0.5"),
    (MIXTRAL, {"rope_scaling": {"type": ["linear"]}}, "rope scaling ['linear'] is not supported"),
    (MIXTRAL, {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}}, "'truncate' is 1; expected bool"),
    (MIXTRAL, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope option 'full_attention'"),
    (MIXTRAL, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    (MIXTRAL, {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu' is not supported"),
    (MIXTRAL, {"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    (MIXTRAL, {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; expected int or float"),
    (MIXTRAL, {"rms_norm_eps": 0}, "rms_norm_eps is 0.0; expected a positive number"),
    (MIXTRAL, {"rope_theta": math.inf}, "rope_theta is inf"),
    (MIXTRAL, {"hidden_size": math.nan}, "hidden_size is nan; expected int"),
    (MIXTRAL, {"hidden_size": 40.0}, "hidden_size is 40.0; expected int"),
    (MIXTRAL, {"hidden_size": -40}, "hidden_size is -40; expected a positive size"),
    (MIXTRAL, {"hidden_size": None}, "hidden_size is missing"),
    (MIXTRAL, {"num_local_experts": True}, "num_local_experts is True; expected int"),
    (MIXTRAL, {"num_experts": 4}, "num_experts = 4 contradicts num_local_experts = 6"),
    (MIXTRAL, {"num_experts_per_tok": 7}, "config.json: num_experts_per_tok is 7; a layer has 6 experts"),
    (MIXTRAL, {"num_key_value_heads": 3}, "4 query heads are not a multiple of 3 kv heads"),
    (MIXTRAL, {"head_dim": 9}, "head_dim is 9; rotary positions need an even size"),
    (MIXTRAL, {"sliding_window": 0}, "sliding_window is 0"),
    (MIXTRAL, {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected bool"),
    (MIXTRAL, {"eos_token_id": [1, "2"]}, "eos_token_id is [1, '2']; expected token ids"),
    (MIXTRAL, {"torch_dtype": "float64"}, "dtype = 'float64' is not supported"),
    (MIXTRAL, {"is_encoder_decoder": True}, "is_encoder_decoder = True is not supported"),
    (OLMOE, {"head_dim": 12}, "head_dim = 12 is not supported by olmoe; supported: 10"),
    (OLMOE, {"clip_qkv": -1.0}, "clip_qkv is -1.0; expected a positive number"),
    (QWEN2, {"layer_types": ["full_attention"]}, "layer_types is ['full_attention']"),
    (QWEN2, {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer_types is"),
    (QWEN2, {"use_sliding_window": False}, "layer_types has sliding_attention, but use_sliding_window is off"),
    (QWEN2, {"mlp_only_layers": [4]}, "mlp_only_layers is [4]; expected layer indices below 4"),
    (QWEN3, {"sliding_window": 0}, "sliding_window is 0; expected a positive size"),
    (GLM4, {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 is not supported by glm4_moe"),
    (GLM4, {"partial_rotary_factor": 0.1}, "the rotated part of head_dim 12 is 1; rotary positions need an even size"),
    (GLM4, {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported by glm4_moe; supported: 'sigmoid'"),
    (GLM4, {"n_group": 3}, "8 experts are not a multiple of 3 groups"),
    (GLM4, {"first_k_dense_replace": -1}, "first_k_dense_replace is -1; expected 0 or more"),
    (GLM4, {"first_k_dense_replace": 4}, "the model has no MoE layer"),
    (GLM4, {"routed_scaling_factor": 0}, "routed_scaling_factor is 0.0; expected a positive number"),
    (
        GPT_OSS,
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        "quantization_config says FP8, which is not read for gpt_oss",
    ),
    (GPT_OSS, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported by gpt_oss; supported: 'silu'"),
    (GPT_OSS, {"swiglu_limit": -1}, "swiglu_limit is -1.0; expected a positive number"),
    (GPT_OSS, {"sliding_window": None}, "layer_types has sliding_attention, but sliding_window is null"),
    (GPT_OSS, {"layer_types": ["full_attention"] * 2}, "layer_types is ['full_attention', 'full_attention']"),
    (GPT_OSS, {"experts_per_token": 3}, "experts_per_token = 3 contradicts num_experts_per_tok = 2"),
    (GRANITE, {"residual_multiplier": 0}, "residual_multiplier is 0.0; expected a positive number"),
    (GRANITE, {"attention_multiplier": "1"}, "attention_multiplier is '1'; expected int or float"),
    (GRANITE, {"norm_topk_prob": False}, "norm_topk_prob = False is not supported by granitemoe; supported: True"),
    (GRANITE, {"shared_intermediate_size": 8}, "option 'shared_intermediate_size' is not supported by granitemoe"),
    (OPENMOE, {"hidden_act": "silu"}, "hidden_act = 'silu' is not supported by openmoe; supported: 'swiglu'"),
    (OPENMOE, {"router_topk": 3}, "router_topk = 3 is not supported"),
    (OPENMOE, {"topk": 1}, "topk = 1 contradicts router_topk = 2"),
    (OPENMOE, {"router_noisy_policy": "Jitter"}, "router_noisy_policy = 'Jitter' is not supported"),
    (OPENMOE, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = "),
    (OPENMOE, {"mlp_gated": False}, "mlp_gated = False is not supported"),
]


@pytest.mark.parametrize(("raw", "change", "message"), REFUSED, ids=lambda value: json.dumps(value)[:60])
def test_refused_by_name(raw, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        config_from_hf(raw | change)
    assert "\n" not in str(error.value)


def test_not_a_number_in_the_file(tmp_path):
    text = json.dumps(MIXTRAL | {"rope_theta": math.nan})
    assert "NaN" in text
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="rope_theta is nan"):
        config_from_directory(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        config_from_directory(tmp_path)


FAMILIES = {
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen2_moe": QWEN2,
    "qwen3_moe": QWEN3,
    "openmoe": OPENMOE,
    "glm4_moe": GLM4,
    "granitemoe": GRANITE,
    "gpt_oss": GPT_OSS,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "glm4_moe_lite": GLM4_LITE,
}
DEEPSEEK_OPTIONS = {
    "n_group",
    "topk_group",
    "scoring_func",
    "routed_scaling_factor",
    "num_nextn_predict_layers",
    "n_shared_experts",
    "first_k_dense_replace",
}
OWN_OPTIONS = {
    "glm4_moe": DEEPSEEK_OPTIONS,
    "granitemoe": {"logits_scaling"},
    "deepseek_v2": DEEPSEEK_OPTIONS,
    "deepseek_v3": DEEPSEEK_OPTIONS,
    "glm4_moe_lite": DEEPSEEK_OPTIONS,
    "gpt_oss": {"attention_sinks"},
}
"""Options that a family reads itself, where others know only the value that asks for nothing."""
BOOKKEEPING = {
    "unsloth_version": "2026.1",
    "unsloth_fixed": True,
    "_commit_hash": "abc",
    "_attn_implementation": "sdpa",
    "attn_implementation": "flash_attention_2",
    "experts_implementation": "grouped_mm",
    "transformers.js_config": {"dtype": "q4"},
    "torch_version": "2.9",
    "model_name": "mine",
    "base_model": "theirs",
    "hidden_dropout": 0.1,
    "use_flash_attn": True,
    "gradient_checkpointing": True,
    "chat_template": "{{ messages }}",
    "router_z_loss_coef": 0.1,
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", BOOKKEEPING)
def test_bookkeeping_is_ignored_with_one_warning(name, key, caplog):
    raw = FAMILIES[name]
    assert config_from_hf({**raw, key: BOOKKEEPING[key]}) == config_from_hf(raw)
    (record,) = caplog.records
    assert record.getMessage().endswith(f": {key}")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_file_is_read_without_a_warning(name, caplog):
    config_from_hf(FAMILIES[name])
    config_from_hf({**MIXTRAL_8X7B, "mlp_bias": False})
    assert not caplog.records


NEUTRAL_EVERYWHERE = {
    "mlp_bias": (False, True),
    "n_group": (1, 4),
    "topk_group": (1, 2),
    "scoring_func": ("softmax", "sigmoid"),
    "routed_scaling_factor": (1.0, 2.5),
    "num_nextn_predict_layers": (0, 1),
    "n_shared_experts": (0, 1),
    "first_k_dense_replace": (0, 1),
    "logits_scaling": (1.0, 8.0),
    "final_logit_softcapping": (None, 30.0),
    "attention_sinks": (False, True),
    "use_bias": (False, True),
}


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, key) for name in FAMILIES for key in NEUTRAL_EVERYWHERE if key not in OWN_OPTIONS.get(name, ())],
)
def test_values_that_ask_for_nothing_are_taken_and_others_refused(name, key):
    raw = FAMILIES[name]
    neutral, other = NEUTRAL_EVERYWHERE[key]
    assert config_from_hf({**raw, key: neutral}) == config_from_hf(raw)
    with pytest.raises(ConfigError, match=f"{key}.* is not supported by {name}"):
        config_from_hf({**raw, key: other})


@pytest.mark.parametrize(
    ("raw", "taken", "refused"),
    [
        (MIXTRAL_8X7B, {"layer_types": ["full_attention"] * 32}, {"layer_types": ["full_attention"] * 31}),
        (MIXTRAL_8X7B, {"norm_topk_prob": True}, {"norm_topk_prob": False}),
        (MIXTRAL_8X7B, {"moe_intermediate_size": 14336}, {"moe_intermediate_size": 8}),
        (MIXTRAL_8X7B, {"use_sliding_window": False}, {"use_qk_norm": True}),
        (MIXTRAL_8X7B, {"use_sliding_window": False, "sliding_window": 64}, {"qkv_bias": True}),
        (MIXTRAL_8X7B, {"mlp_only_layers": [], "decoder_sparse_step": 1}, {"mlp_only_layers": [1]}),
        (QWEN3_30B, {"layer_types": ["full_attention"] * 48}, {"layer_types": ["linear_attention"] * 48}),
        (QWEN3_30B, {"use_qk_norm": True}, {"use_qk_norm": False}),
        (QWEN3_30B, {"shared_expert_intermediate_size": 0}, {"shared_expert_intermediate_size": 8}),
        (OLMOE, {"qk_norm": True, "use_sliding_window": False, "sliding_window": 4096}, {"sliding_window": 4096}),
        (
            OPENMOE,
            {"layer_types": ["full_attention"] * OPENMOE["num_hidden_layers"]},
            {"layer_types": ["chunked_attention"]},
        ),
    ],
)
def test_values_of_sibling_families(raw, taken, refused):
    assert config_from_hf({**raw, **taken}) == config_from_hf(raw)
    with pytest.raises(ConfigError, match=next(iter(refused))):
        config_from_hf({**raw, **refused})


@pytest.mark.parametrize(
    "key", ["use_magic", "output_multiplier", "attention_scale", "rope_local_base_freq", "num_memory_tokens", "softcap"]
)
def test_what_nobody_knows_is_refused(key):
    with pytest.raises(ConfigError, match=f"option '{key}' is not supported"):
        config_from_hf({**MIXTRAL, key: 1})


@pytest.mark.parametrize(
    ("max_position", "scaling", "limit"),
    [
        (128, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (128, {"rope_type": "yarn", "factor": 4}, 512),
        (40960, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (512, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (163840, {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),
        (1000, {"rope_type": "yarn", "original_max_position_embeddings": 300}, 1000),
        (1000, {"rope_type": "yarn", "factor": 1.1}, 1100),
        (2048, {"rope_type": "linear", "factor": 2.5}, 5120),
        (100, {"type": "linear", "factor": 3}, 300),
        (
            131072,
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            131072,
        ),
        (4096, {"rope_type": "default"}, 4096),
        (4096, None, 4096),
    ],
)
@pytest.mark.parametrize("base", [MIXTRAL, QWEN3], ids=["mixtral", "qwen3"])
def test_the_context_is_what_the_scaling_rule_makes_of_it(
    base: dict[str, Any], max_position: int, scaling: dict[str, Any] | None, limit: int
) -> None:
    """For `rope_scaling` and for `rope_parameters`, and the memory plan goes by it."""
    raw = base | {"max_position_embeddings": max_position}
    config = config_from_hf(raw | {"rope_scaling": scaling})
    assert config.max_position == limit
    if scaling is not None:
        assert config_from_hf(raw | {"rope_parameters": scaling}).max_position == limit
    plan = functools.partial(MemoryPlan.of, config, platform="cpu", device_bytes=1 << 42, expert_memory="100%")
    assert plan(max_model_len=limit).max_model_len == limit
    with pytest.raises(ConfigError, match=f"max_model_len is {limit + 1}; the model allows 2 to {limit}"):
        plan(max_model_len=limit + 1)


def test_a_context_beyond_32_bits_is_refused() -> None:
    raw = MIXTRAL | {"max_position_embeddings": 2**30, "rope_scaling": {"type": "linear", "factor": 2.0}}
    with pytest.raises(ConfigError, match=f"makes a context of {2**31} tokens"):
        config_from_hf(raw)
