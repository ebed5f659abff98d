"""Which family a checkpoint is of."""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from emoe_jax.checkpoint.family import Family
from emoe_jax.errors import ConfigError

_PACKAGE = __name__.rpartition(".")[0]


@functools.cache
def families() -> tuple[Family, ...]:
    """Every `Family` that a file of this package defines, in the order of the files' names.

    Found when they are first asked for, so that a family is one file and no list names it.
    """
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
        for value in vars(importlib.import_module(f"{_PACKAGE}.{module.name}")).values():
            if isinstance(value, Family):
                found[value.name] = value
    return tuple(found.values())


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family of a `config.json`, by architecture first (OpenMoE calls its model type "llama").

    Raises `ConfigError` naming the architecture when none fits.
    """
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise ConfigError(f"config.json: architectures is {architectures!r}; expected a list of names")
    for family in families():
        if any(name in family.architectures for name in architectures):
            return family
    model_type = raw.get("model_type")
    if not architectures:
        for family in families():
            if model_type in family.model_types:
                return family
    found = ", ".join(map(str, architectures)) or f"model_type {model_type!r}"
    known = ", ".join(name for family in families() for name in family.architectures)
    raise ConfigError(f"config.json: architecture {found} is not supported; supported: {known}")


def family_named(name: str) -> Family:
    """The family that a `ModelConfig` names."""
    return next(family for family in families() if family.name == name)
