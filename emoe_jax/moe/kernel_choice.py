"""Tile sizes that were measured on this device (`emoe bench kernels`), kept in a file, and used by the Triton backend.

A file is for one kind of device, one version of JAX, and experts of one shape and format. What is in use is set before
steps are traced, and is the same for all engines of a process.
"""

import dataclasses
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.folders import cache_folder
from emoe_jax.moe.dequantise import is_blocked
from emoe_jax.moe.kernel_config import DEFAULT_TABLE, KernelConfig, KernelTable

FORMAT = 1

log = logging.getLogger("emoe_jax.moe")


class KernelKey(NamedTuple):
    """The experts that tile sizes were chosen for."""

    hidden: int
    expert_hidden: int
    num_experts: int
    top_k: int
    ffn: str
    dtype: str
    """Of the rows."""
    expert_format: str

    @classmethod
    def of(cls, config: ModelConfig, dtype: str, expert_format: str) -> "KernelKey":
        """Of a model whose experts are kept in a format, and whose rows have a dtype."""
        sizes = config.hidden_size, config.expert_hidden, config.num_experts, config.top_k
        return cls(*sizes, config.ffn, dtype, expert_format)


_IN_USE: dict[KernelKey, KernelTable] = {}


def table_for(config: ModelConfig, dtype: str | np.dtype, experts: ExpertWeights) -> KernelTable:
    """The tile sizes for these experts: those in use, else the defaults."""
    return _IN_USE.get(KernelKey.of(config, str(dtype), _format_of(experts)), DEFAULT_TABLE)


def use_choice(key: KernelKey, device_kind: str) -> Path | None:
    """Use what was measured for these experts on this kind of device, else the defaults; the file, if there is one.

    A file that is broken, or of something else, is left alone with a warning.
    """
    path = choice_file(key, device_kind)
    table = _read(path, key, device_kind)
    if (table or DEFAULT_TABLE) != _IN_USE.get(key, DEFAULT_TABLE):
        jax.clear_caches()  # what was traced so far has the other tile sizes
    if table is None:
        _IN_USE.pop(key, None)
        return None
    _IN_USE[key] = table
    return path


def save_choice(key: KernelKey, device_kind: str, table: KernelTable, measured: Any) -> Path:
    """Keep tile sizes, and what was measured of them, for `use_choice` of later processes. Returns the file."""
    path = choice_file(key, device_kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {
        **_identity(key, device_kind),
        "limits": list(table.limits),
        "configs": [dataclasses.asdict(config) for config in table.configs],
        "measured": measured,
    }
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(described, indent=1) + "\n")
    draft.replace(path)
    return path


def choice_file(key: KernelKey, device_kind: str) -> Path:
    """Where the choice for these experts on this kind of device is, or would be."""
    digest = hashlib.sha256(json.dumps(_identity(key, device_kind)).encode()).hexdigest()[:12]
    device = re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")
    return cache_folder() / "kernels" / f"{device}-{digest}.json"


def _identity(key: KernelKey, device_kind: str) -> dict[str, Any]:
    return {"format": FORMAT, "device_kind": device_kind, "jax": jax.__version__, "experts": key._asdict()}


def _read(path: Path, key: KernelKey, device_kind: str) -> KernelTable | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for name, wanted in _identity(key, device_kind).items():
            if values[name] != wanted:
                raise ValueError(f"its {name} is {values[name]!r}, not {wanted!r}")
        limits = tuple(int(limit) for limit in values["limits"])
        configs = tuple(KernelConfig(**config) for config in values["configs"])
        if len(configs) != len(limits) + 1 or list(limits) != sorted(set(limits)):
            raise ValueError(f"it has {len(configs)} sets of tile sizes for {len(limits)} limits")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        log.warning("ignored the measured tile sizes in %s: %s; `emoe bench kernels` makes them anew", path, reason)
        return None
    return KernelTable(limits, configs)


def _format_of(experts: ExpertWeights) -> str:
    """The name of the `RecordFormat` that the arrays are of."""
    scales = experts.in_scales
    if scales is None:
        return str(experts.w_in.dtype)
    if not is_blocked(scales):
        return "int8"
    return "mxfp4" if scales.dtype == np.uint8 else "fp8"
