"""Checkpoints in published quantised formats that do not fit: one line names file, tensor, found and expected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax.errors import CheckpointError, ConfigError
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.models import config_from_hf, load_dense, open_checkpoint
from tests.golden.packed import FP8, FP8_CONFIG, GPT_OSS, MXFP4_CONFIG, Tensors, fp8_tensors, mxfp4_tensors, write

WEIGHTS = "model.safetensors"
QWEN3 = FP8["qwen3_moe"][0]
EXPERTS = "model.layers.1.mlp.experts"
Change = Callable[[Tensors], Any]


def published(name: str) -> tuple[dict[str, Any], Tensors]:
    """The configuration and the tensors of a checkpoint in this format."""
    if name == "mxfp4":
        return GPT_OSS | {"quantization_config": MXFP4_CONFIG}, mxfp4_tensors(GPT_OSS)[0]
    return QWEN3 | {"quantization_config": FP8_CONFIG}, fp8_tensors(*FP8["qwen3_moe"])[0]


def read_all(directory: Path, name: str) -> None:
    """Open a checkpoint, and read all weights as they are kept."""
    checkpoint = open_checkpoint(directory)
    load_dense(checkpoint, "float32")
    record_format = RecordFormat.of(checkpoint.config, name)
    for layer, expert in np.ndindex(len(checkpoint.config.moe_layers), checkpoint.config.num_experts):
        record = np.empty(record_format.size, record_format.dtype)
        checkpoint.read_expert(layer, expert, record, record_format)


GATE_UP, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
PROJECTION = "model.layers.1.mlp.experts.3.up_proj.weight"
QUERIES = "model.layers.0.self_attn.q_proj.weight"
SCALES = f"{PROJECTION}_scale_inv"


def changed(array: np.ndarray, value: float) -> np.ndarray:
    """With one other number."""
    array = array.copy()
    array.flat[-1] = value
    return array


MXFP4_PROBLEMS: dict[str, tuple[Change, str]] = {
    "missing scales": (
        lambda t: t.pop(f"{DOWN}_scales"),
        f"{WEIGHTS}: tensor {DOWN}_scales is missing; config.json says mxfp4 experts, so {DOWN}_blocks has scales",
    ),
    "shape of scales": (
        lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"][:, :-1]}),
        rf"{WEIGHTS}: tensor {DOWN}_scales has shape \(5, 63, 1\); expected \(5, 64, 1\)",
    ),
    "dtype of blocks": (
        lambda t: t.update({f"{DOWN}_blocks": t[f"{DOWN}_blocks"].astype(np.float32)}),
        f"{WEIGHTS}: tensor {DOWN}_blocks is F32; expected U8, as config.json says mxfp4 experts",
    ),
    "floats in one layer": (
        lambda t: [t.pop(f"{GATE_UP}_blocks"), t.update({GATE_UP: np.zeros((5, 64, 64), np.float32)})],
        f"{WEIGHTS}: tensor {GATE_UP} is F32; expected {GATE_UP}_blocks in its place, as config.json says mxfp4",
    ),
    "floats beside": (
        lambda t: t.update({GATE_UP: np.zeros((5, 64, 64), np.float32)}),
        f"{WEIGHTS}: tensor {GATE_UP} is not part of gpt_oss",
    ),
    "no number": (
        lambda t: t.update({f"{DOWN}_scales": changed(t[f"{DOWN}_scales"], 255)}),
        f"{WEIGHTS}: tensor {DOWN}_scales has scales of 255, which is not a number; expected 0 to 254",
    ),
}

FP8_PROBLEMS: dict[str, tuple[Change, str]] = {
    "missing scales": (
        lambda t: t.pop(SCALES),
        f"{WEIGHTS}: tensor {SCALES} is missing; config.json says fp8 weights, so {PROJECTION} has scales",
    ),
    "missing dense scales": (
        lambda t: t.pop(f"{QUERIES}_scale_inv"),
        f"{WEIGHTS}: tensor {QUERIES}_scale_inv is missing; config.json says fp8 weights",
    ),
    "shape of scales": (
        lambda t: t.update({SCALES: np.ones((1, 2), np.float32)}),
        rf"{WEIGHTS}: tensor {SCALES} has shape \(1, 2\); expected \(2, 2\)",
    ),
    "dtype of scales": (
        lambda t: t.update({SCALES: np.ones((2, 2), np.uint8)}),
        f"{WEIGHTS}: tensor {SCALES} is U8; weights must be one of F32, F16, BF16",
    ),
    "floats in one expert": (
        lambda t: [t.pop(SCALES), t.update({PROJECTION: np.zeros((136, 144), jnp.bfloat16)})],
        f"{WEIGHTS}: tensor {PROJECTION} is BF16; expected F8_E4M3, as config.json says fp8 weights",
    ),
    "no number": (
        lambda t: t.update({SCALES: changed(t[SCALES], np.nan)}),
        f"{WEIGHTS}: tensor {SCALES} has scales that are negative or not finite; expected finite numbers from 0 up",
    ),
    "infinite": (
        lambda t: t.update({f"{QUERIES}_scale_inv": changed(t[f"{QUERIES}_scale_inv"], np.inf)}),
        f"{WEIGHTS}: tensor {QUERIES}_scale_inv has scales that are negative or not finite",
    ),
    "a weight that is no number": (
        lambda t: t.update({PROJECTION: changed(t[PROJECTION], np.nan)}),
        f"{WEIGHTS}: {PROJECTION} has values that are not finite",
    ),
}


@pytest.mark.parametrize(
    ("name", "problem"),
    [*(("mxfp4", problem) for problem in MXFP4_PROBLEMS), *(("fp8", problem) for problem in FP8_PROBLEMS)],
)
def test_what_does_not_fit_is_one_line(name: str, problem: str, tmp_path: Path) -> None:
    """When the checkpoint is opened, or when the weight is read."""
    change, message = {"mxfp4": MXFP4_PROBLEMS, "fp8": FP8_PROBLEMS}[name][problem]
    raw, tensors = published(name)
    change(tensors)
    write(tmp_path, raw, tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_all(tmp_path, name)
    assert "\n" not in str(caught.value)


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    """Of the file, and of a model that there is no file of."""
    raw = GPT_OSS | {"intermediate_size": 48}
    write(tmp_path, raw | {"quantization_config": MXFP4_CONFIG}, mxfp4_tensors(raw)[0])
    with pytest.raises(CheckpointError, match=r"down_proj_blocks has rows of 48 numbers, .* a multiple of 32"):
        open_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="a matrix of 64 x 48; MXFP4 has rows of a multiple of 32"):
        RecordFormat.of(config_from_hf(raw), "mxfp4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mxfp4",
            'gate_up_proj_blocks has experts in MXFP4; expected config.json to say so, .*"quant_method": "mxfp4"',
        ),
        ("fp8", "is F8_E4M3; weights must be one of F32, F16, BF16; quantised ones need a quantization_config"),
    ],
)
def test_what_config_json_does_not_mention_is_refused(name: str, message: str, tmp_path: Path) -> None:
    raw, tensors = published(name)
    del raw["quantization_config"]
    write(tmp_path, raw, tensors)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight_block_size": None}, r"weight_block_size = None, which is not read; expected \[128, 128\]"),
        ({"weight_block_size": [1, 128]}, r"weight_block_size = \[1, 128\], which is not read; expected \[128, 128\]"),
        ({"fmt": "e5m2"}, "fmt = 'e5m2', which is not read; expected 'e4m3'"),
        ({"activation_scheme": "static"}, "activation_scheme = 'static', which is not read; expected 'dynamic'"),
    ],
)
def test_other_kinds_of_fp8_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: quantization_config says FP8 with {says}; use .*int8"):
        config_from_hf(QWEN3 | {"quantization_config": FP8_CONFIG | change})


def test_fp8_is_not_made_of_mxfp4(tmp_path: Path) -> None:
    write(tmp_path, *published("mxfp4"))
    with pytest.raises(CheckpointError, match="has experts in mxfp4, of which fp8 is not made; expected int8 or"):
        read_all(tmp_path, "fp8")
