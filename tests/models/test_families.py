"""What a family is made of: one file, found by itself, whose tensors are those of the published models."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import emoe_jax.models
from emoe_jax.config import ModelConfig
from emoe_jax.errors import CheckpointError
from emoe_jax.models import config_from_hf, families, family_of, open_checkpoint
from tests.golden.tiny import CONFIGS, random_tensors
from tests.models.loaded import load
from tests.models.published import GLM_45_AIR, GPT_OSS_20B, GRANITE_3B, MIXTRAL_8X7B, OPENMOE_8B, QWEN3_30B

MADE_UP = '''
"""Mixtral's experts behind a sigmoid router in groups, clipped attention, heads that are rotated in part."""

from functools import partial

from emoe_jax.checkpoint.family import Family
from emoe_jax.config import ModelConfig, RouterConfig
from emoe_jax.models.hf_config import HfConfig
from emoe_jax.models.tensors import decoder_tensors, expert_sources


def _config(raw):
    hf = HfConfig("made_up", raw)
    decoder = hf.decoder(norm_eps=1e-5, max_position=128, rotated_part=0.5)
    config = ModelConfig(
        **decoder,
        num_kv_heads=hf.kv_heads(decoder["num_heads"]),
        num_experts=hf.size("experts"),
        top_k=2,
        expert_hidden=hf.size("intermediate_size"),
        shared_expert_hidden=8,
        shared_expert_gate=True,
        moe_layers=(1,),
        dense_hidden=20,
        qk_norm="full",
        clip_qkv=0.8,
        sliding_windows=(None, 5),
        router=RouterConfig(score="sigmoid", choice_bias=True, groups=2, scale=0.5),
    )
    hf.finish()
    return config


FAMILY = Family(
    name="made_up",
    model_types=("made_up",),
    architectures=("MadeUpForCausalLM",),
    config=_config,
    dense_tensors=partial(decoder_tensors, router="mlp.router.weight"),
    expert_sources=expert_sources,
)
'''
RAW = {
    "architectures": ["MadeUpForCausalLM"],
    "model_type": "made_up",
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 12,
    "experts": 6,
}


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more file in the package of the families, and nothing else."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "made_up.py").write_text(MADE_UP)
    monkeypatch.setattr(emoe_jax.models, "__path__", [*emoe_jax.models.__path__, str(tmp_path / "package")])
    importlib.invalidate_caches()
    families.cache_clear()
    yield
    families.cache_clear()
    sys.modules.pop("emoe_jax.models.made_up", None)


def test_every_family_is_found_once() -> None:
    names = [family.name for family in families()]
    assert len(set(names)) == len(names) >= 6
    assert {family_of(raw).name for raw in CONFIGS.values()} | {"openmoe"} == set(names)


@pytest.mark.usefixtures("made_up")
def test_a_new_family_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(RAW))
    save_file(random_tensors(RAW), tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    logits, (routing,) = load(tmp_path / "model").forward(np.arange(24).reshape(2, 12))
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1
    np.testing.assert_allclose(np.asarray(routing.weights).sum(axis=-1), 0.5, rtol=1e-5)
    groups = np.asarray(routing.ids) // 3
    assert (groups[:, 0] == groups[:, 1]).all()


def test_layers_behind_the_last_are_ignored_and_other_tensors_are_not(tmp_path: Path) -> None:
    """GLM's checkpoints hold a layer that guesses tokens ahead."""
    raw = CONFIGS["glm4_raw"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for layer, refused in ((4, False), (3, True)):
        extra = {f"model.layers.{layer}.eh_proj.weight": np.zeros((4, 4), np.float32)}
        save_file(random_tensors(raw) | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
        if not refused:
            open_checkpoint(tmp_path)
            continue
        with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight is not part of glm4_moe"):
            open_checkpoint(tmp_path)


def test_the_bias_of_the_choice_stays_float32(tmp_path: Path) -> None:
    """Rounded to bfloat16 it would choose other experts than the checkpoint's authors."""
    raw = CONFIGS["glm4_groups"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tensors = random_tensors(raw)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    state = load(tmp_path, "bfloat16").state
    (name,) = (name for name in tensors if name.startswith("model.layers.2.") and name.endswith("correction_bias"))
    router = state["layers"][2]["router"]
    np.testing.assert_array_equal(router["choice_bias"][...], tensors[name])
    assert router["weight"][...].dtype == "bfloat16"


def total_parameters(config: ModelConfig) -> int:
    family = next(f for f in families() if f.name == config.family)
    dense = sum(math.prod(part.shape) for parts in family.dense_tensors(config).values() for part in parts)
    return dense + len(config.moe_layers) * config.num_experts * config.expert_params


@pytest.mark.parametrize(
    ("raw", "parameters"),
    [
        (MIXTRAL_8X7B, 46_702_792_704),
        (QWEN3_30B, 30_532_122_624),
        (OPENMOE_8B, 11_855_046_656),
        (GLM_45_AIR, 106_852_251_264),
        (GRANITE_3B, 3_298_793_472),
        (GPT_OSS_20B, 20_914_757_184),
    ],
)
def test_published_sizes(raw, parameters):
    assert total_parameters(config_from_hf(raw)) == parameters
