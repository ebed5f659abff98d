"""The families of latent attention: what published files mean, what is refused, and what becomes of the tensors."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emoe_jax.config import LatentConfig
from emoe_jax.errors import ConfigError
from emoe_jax.models import config_from_hf, open_checkpoint, save_checkpoint
from emoe_jax.planning.catalogue import find_model
from tests.golden.latent import LATENT
from tests.golden.tiny import random_tensors, write_checkpoint
from tests.models.loaded import load

V2, V3, LITE = LATENT["deepseek_v2_groups"], LATENT["deepseek_v3_groups"], LATENT["glm4_lite_layers"]


def test_deepseek_v2_lite() -> None:
    """Queries of the hidden state itself; the temperature of YaRN is in the scores, and not in the rotation."""
    _, config = find_model("deepseek-v2-lite")
    assert config.latent == LatentConfig(kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128)
    assert (config.num_kv_heads, config.head_dim, config.value_head_dim, config.kept_numbers) == (1, 576, 512, 576)
    assert config.attention_scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * np.log(40) + 1) ** 2)
    assert (config.rope.attention_factor, config.rope.interleaved, config.max_position) == (1.0, True, 163840)
    assert (config.moe_layers, config.shared_expert_hidden) == (tuple(range(1, 27)), 2 * 1408)
    assert (config.router.score, config.router.norm_topk_prob, config.router.choice_bias) == ("softmax", False, False)


def test_deepseek_v3() -> None:
    _, config = find_model("deepseek-v3")
    assert config.latent == LatentConfig(kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128, q_rank=1536)
    assert (config.moe_layers, config.expert_format) == (tuple(range(3, 61)), "fp8")
    router = config.router
    assert (router.score, router.groups, router.chosen_groups, router.scale) == ("sigmoid", 8, 4, 2.5)
    assert (router.group_rank, router.choice_bias, router.norm_topk_prob) == ("two_best", True, True)


def test_layers_of_glm4_moe_lite() -> None:
    assert find_model("glm-4.7-flash")[1].moe_layers == tuple(range(1, 47))
    assert config_from_hf(LITE).moe_layers == (0, 2)
    agreed = LITE | {"mlp_layer_types": ["dense", "dense", "sparse"]}
    assert config_from_hf(agreed | {"first_k_dense_replace": 2}).moe_layers == (2,)


REFUSED = [
    (V2, {"norm_topk_prob": True}, "norm_topk_prob = True is not supported by deepseek_v2; supported: False"),
    (V2, {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc' is not supported by deepseek_v2; supported: 'greedy'"),
    (V2, {"rope_interleave": False}, "rope_interleave = False is not supported by deepseek_v2"),
    (V2, {"moe_layer_freq": 2}, "option 'moe_layer_freq' is not supported by deepseek_v2"),
    (V2, {"n_group": 3}, "8 experts are not a multiple of 3 groups"),
    (V3, {"num_key_value_heads": 2}, "num_key_value_heads = 2 is not supported by deepseek_v3; supported: 4"),
    (V3, {"head_dim": 18}, "head_dim = 18 is not supported by deepseek_v3; supported: 8"),
    (V3, {"qk_head_dim": 8}, "qk_head_dim = 8 is not supported by deepseek_v3; supported: 18"),
    (V3, {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; rotary positions need an even size"),
    (V3, {"kv_lora_rank": 0}, "kv_lora_rank is 0; expected a positive size"),
    (V3, {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported by deepseek_v3"),
    (V3, {"topk_group": 5}, "5 chosen groups of experts do not fit 4 groups"),
    (V3, {"n_group": 8}, "top-k of 3 does not fit 2 groups of 1 experts, at least 2 each"),
    (V3, {"sliding_window": 8}, "option 'sliding_window' is not supported by deepseek_v3"),
    (LITE, {"mlp_layer_types": ["dense"]}, "mlp_layer_types is ['dense']; expected dense or sparse for 3 layers"),
    (LITE, {"first_k_dense_replace": 1}, "first_k_dense_replace = 1 is not supported by glm4_moe_lite"),
]


@pytest.mark.parametrize(("raw", "change", "message"), REFUSED, ids=lambda value: json.dumps(value)[:50])
def test_refused_by_name(raw: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_hf(raw | change)


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "deepseek_v3_groups"])
def test_saved_tensors_are_those_that_were_loaded(name: str, tmp_path: Path) -> None:
    """The maps of keys and values, two arrays here, are one tensor again."""
    raw = LATENT[name]
    loaded = load(write_checkpoint(tmp_path / "ours", raw))
    save_checkpoint(tmp_path / "saved", raw, loaded.state, loaded.experts)
    saved, original = load_file(tmp_path / "saved" / "model.safetensors"), random_tensors(raw)
    assert saved.keys() == original.keys()
    for key, value in original.items():
        np.testing.assert_array_equal(saved[key], value)


def test_the_bytes_of_a_shared_tensor_count_once(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, V3)
    dense = sum(value.nbytes for key, value in random_tensors(V3).items() if ".experts." not in key)
    assert open_checkpoint(directory).dense_bytes == dense


def test_layers_that_guess_tokens_ahead_are_ignored(tmp_path: Path) -> None:
    """DeepSeek-V3's checkpoints have one behind the last layer, with experts of its own."""
    (tmp_path / "config.json").write_text(json.dumps(V3))
    names = ("eh_proj.weight", "enorm.weight", "self_attn.kv_b_proj.weight", "mlp.experts.0.up_proj.weight")
    extra = {f"model.layers.3.{name}": np.zeros((4, 4), np.float32) for name in names}
    save_file(random_tensors(V3) | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(tmp_path).config.num_layers == 3
