"""Tiny checkpoints in published quantised formats, each with a twin that has the same values as floats.

Values are made from bits by tables and shapes of their own, without the library's code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.golden.tiny import CONFIGS, random_tensors

MXFP4_CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}

GPT_OSS = CONFIGS["gpt_oss_windows"] | {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 5}
"""Sizes that are whole blocks of 32."""

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
    """`[E, rows, columns]` in float32."""
    values = np.empty((*blocks.shape[:-1], 32), np.float32)
    values[..., ::2], values[..., 1::2] = _FP4[blocks % 16], _FP4[blocks // 16]
    values *= 2.0 ** (scales[..., None].astype(np.float32) - 127)
    return values.reshape(*blocks.shape[:2], -1)


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
