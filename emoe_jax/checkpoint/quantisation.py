"""How `config.json` says that weights are quantised: the formats that are read, and the names of the others."""

from collections.abc import Sequence
from typing import Any

from emoe_jax.errors import ConfigError
from emoe_jax.experts.blocks import FP8_BLOCK

KEY = "quantization_config"
METHOD = "emoe"
"""The `quant_method` of checkpoints that `emoe_jax.checkpoint.convert` writes."""

_NAMES = {"awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "mxfp4": "MXFP4", "gguf": "GGUF", "fbgemm_fp8": "FP8"}
_INSTEAD = "use the checkpoint that it was made from with --expert-format int8, which quantises experts while loading"


def quantization_config(expert_format: str) -> dict[str, str]:
    """What `config.json` has under `KEY` where the experts are stored in this format."""
    return {"quant_method": METHOD, "experts": expert_format}


def stored_expert_format(value: Any, family: str, formats: Sequence[str] = ()) -> str | None:
    """The format of the experts that `quantization_config` says; None where they are plain.

    `formats` are those that checkpoints of the family come in, besides the ones that `convert` writes. Raises
    `ConfigError`, which names the format, for one that is not read.
    """
    if value is None:
        return None
    if value == quantization_config("int8"):
        return "int8"
    if not isinstance(value, dict):
        raise ConfigError(f"config.json: {KEY} is {value!r}; expected an object")
    method = value.get("quant_method")
    if method in formats and method == "mxfp4":
        return "mxfp4"
    if method in formats and method == "fp8":
        _check_fp8(value)
        return "fp8"
    raise ConfigError(f"config.json: {KEY} says {_name(value)}, which is not read for {family}; {_INSTEAD}")


def _check_fp8(value: dict[str, Any]) -> None:
    """Refuse what is not e4m3 in blocks, or needs scales of activations."""
    blocks = [FP8_BLOCK, FP8_BLOCK]
    for key, found, expected in (
        ("weight_block_size", value.get("weight_block_size"), blocks),
        ("fmt", value.get("fmt", "e4m3"), "e4m3"),
        ("activation_scheme", value.get("activation_scheme", "dynamic"), "dynamic"),
    ):
        if found != expected:
            raise ConfigError(
                f"config.json: {KEY} says FP8 with {key} = {found!r}, which is not read; expected {expected!r}; "
                f"{_INSTEAD}"
            )


def _name(value: dict[str, Any]) -> str:
    """What people call the format."""
    method = str(value.get("quant_method") or "no quant_method")
    if method == METHOD:
        return f"experts in {value.get('experts')!r}"
    # Tools with several formats say which under keys of their own, such as "nvfp4-pack-quantized".
    detail = str(value.get("quant_algo") or value.get("format") or "")
    for name in ("NVFP4", "MXFP4", "FP8"):
        if name.lower() in detail.lower():
            return f"{name} ({method})"
    return _NAMES.get(method, f"{method} ({detail})" if detail else method)
