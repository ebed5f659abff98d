"""Tiny checkpoints in published quantised formats, each with a twin that has the same values as floats.

Values are made from bits by tables and shapes of their own, without the library's code.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from tests.golden.tiny import CONFIGS, random_tensors

MXFP4_CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}

GPT_OSS = CONFIGS["gpt_oss_windows"] | {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 5}
"""Sizes that are whole blocks of 32."""

FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}

_SIZES = {"hidden_size": 144, "moe_intermediate_size": 136, "intermediate_size": 264}
FP8: dict[str, tuple[dict[str, Any], Any]] = {
    "qwen3_moe": (CONFIGS["qwen3_window"] | _SIZES | {"num_experts": 5}, jnp.bfloat16),
    "glm4_moe": (CONFIGS["glm4_groups"] | _SIZES, np.float32),
    "deepseek_v3": (CONFIGS["deepseek_v3_groups"] | _SIZES | {"kv_lora_rank": 132, "q_lora_rank": 140}, np.float32),
}
"""Sizes that are no multiples of 128, and the dtype of scales in the family's checkpoints."""

_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

Tensors = dict[str, np.ndarray]


def mxfp4_tensors(raw: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    """A gpt-oss checkpoint as it is published, and with its experts in float32 as transformers saves them."""
    packed, floats = {}, {}
    for name, value in random_tensors(raw).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = floats[name] = value
            continue
        E, columns, rows = value.shape  # [in, out]
        rng = np.random.default_rng(len(packed))
        blocks = rng.integers(0, 256, (E, rows, columns // 32, 16)).astype(np.uint8)
        scales = rng.integers(122, 126, (E, rows, columns // 32)).astype(np.uint8)
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
        floats[name] = fp4_values(blocks, scales).swapaxes(1, 2)
    return packed, floats


def fp4_values(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weights of all experts, `[out, in]`, in float32."""
    values = np.empty((*blocks.shape[:-1], 32), np.float32)
    values[..., ::2], values[..., 1::2] = _FP4[blocks % 16], _FP4[blocks // 16]
    values *= 2.0 ** (scales[..., None].astype(np.float32) - 127)
    return values.reshape(*blocks.shape[:2], -1)


def fp8_tensors(raw: Mapping[str, Any], scale_dtype: Any) -> tuple[Tensors, Tensors]:
    """A checkpoint as DeepSeek and Qwen publish them, dense projections included, and its twin in float32."""
    packed, floats = {}, {}
    for name, value in random_tensors(raw).items():
        if not name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            packed[name] = floats[name] = value
            continue
        largest = _largest_of_blocks(value)
        scales = (largest / 448).astype(scale_dtype)
        wide = _spread(scales.astype(np.float32), value.shape)
        numbers = (value / wide).clip(-448, 448).astype(jnp.float8_e4m3fn)
        packed[name], packed[f"{name}_scale_inv"] = numbers, scales
        floats[name] = numbers.astype(np.float32) * wide
    return packed, floats


def _largest_of_blocks(value: np.ndarray) -> np.ndarray:
    rows, columns = value.shape
    return np.array(
        [
            [np.abs(value[row : row + 128, column : column + 128]).max() for column in range(0, columns, 128)]
            for row in range(0, rows, 128)
        ],
        np.float32,
    )


def _spread(scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.kron(scales, np.ones((128, 128), np.float32))[: shape[0], : shape[1]]


def fused(tensors: Tensors) -> Tensors:
    """Experts and their scales as stacks, the gate above up."""
    found: Tensors = {}
    stacks: dict[tuple[str, str], dict[int, dict[str, np.ndarray]]] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight(_scale_inv)?", name)
        if match is None:
            found[name] = value
            continue
        stack, expert, projection, ending = match.groups("")
        stacks.setdefault((stack, ending), {}).setdefault(int(expert), {})[projection] = value
    for (stack, ending), experts in stacks.items():
        ordered = [experts[e] for e in range(len(experts))]
        found[f"{stack}.gate_up_proj{ending}"] = np.stack(
            [np.concatenate([e["gate_proj"], e["up_proj"]]) for e in ordered]
        )
        found[f"{stack}.down_proj{ending}"] = np.stack([e["down_proj"] for e in ordered])
    return found


def write(directory: Path, raw: Mapping[str, Any], tensors: Tensors) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(raw)))
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_mxfp4(directory: Path, raw: Mapping[str, Any] = GPT_OSS) -> tuple[Path, Path]:
    """The directories of a checkpoint in MXFP4 and of its twin."""
    packed, floats = mxfp4_tensors(raw)
    config = dict(raw) | {"quantization_config": MXFP4_CONFIG}
    return write(directory / "mxfp4", config, packed), write(directory / "floats", raw, floats)


def write_fp8(directory: Path, family: str) -> tuple[Path, Path]:
    """The directories of a checkpoint in FP8 and of its twin."""
    raw, scale_dtype = FP8[family]
    packed, floats = fp8_tensors(raw, scale_dtype)
    config = raw | {"quantization_config": FP8_CONFIG}
    return write(directory / "fp8", config, packed), write(directory / "floats", raw, floats)
