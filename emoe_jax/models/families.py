"""Which family a checkpoint is of."""

from collections.abc import Mapping
from typing import Any

from emoe_jax.checkpoint.family import Family
from emoe_jax.errors import ConfigError
from emoe_jax.models.mixtral import MIXTRAL
from emoe_jax.models.olmoe import OLMOE
from emoe_jax.models.openmoe import OPENMOE
from emoe_jax.models.qwen2_moe import QWEN2_MOE
from emoe_jax.models.qwen3_moe import QWEN3_MOE

FAMILIES: tuple[Family, ...] = (MIXTRAL, OPENMOE, OLMOE, QWEN2_MOE, QWEN3_MOE)


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family of a `config.json`, by architecture first (OpenMoE calls its model type "llama").

    Raises `ConfigError` naming the architecture when none fits.
    """
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise ConfigError(f"config.json: architectures is {architectures!r}; expected a list of names")
    for family in FAMILIES:
        if any(name in family.architectures for name in architectures):
            return family
    model_type = raw.get("model_type")
    if not architectures:
        for family in FAMILIES:
            if model_type in family.model_types:
                return family
    found = ", ".join(map(str, architectures)) or f"model_type {model_type!r}"
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ConfigError(f"config.json: architecture {found} is not supported; supported: {known}")
