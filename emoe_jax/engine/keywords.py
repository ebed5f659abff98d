"""The keywords of `Engine.load`: the fields of `EngineConfig`, written nowhere else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from emoe_jax.engine.loading import StageProgress
from emoe_jax.engine_config import EngineConfig
from emoe_jax.errors import ConfigError

OptionsOf = ParamSpec("OptionsOf")
Made = TypeVar("Made", covariant=True)


class Load(Protocol[OptionsOf, Made]):
    """The type of `Engine.load`. The last parameters are those with which an `EngineConfig` is made."""

    def __call__(
        self,
        path: str | Path,
        config: EngineConfig | None = None,
        progress: StageProgress | None = None,
        *args: OptionsOf.args,
        **options: OptionsOf.kwargs,
    ) -> Made: ...


def with_options_of(kind: Callable[OptionsOf, EngineConfig]) -> Callable[[Callable[..., Made]], Load[OptionsOf, Made]]:
    """A decorator for type checkers, which read the options off `kind`. The method itself stays as it is."""

    def unchanged(load: Any) -> Any:
        return load

    return unchanged


def config_of(config: EngineConfig | None, options: dict[str, Any]) -> EngineConfig:
    """The configuration, given as such or as keywords. Raises `ConfigError` for both, and for something else."""
    if config is None:
        return EngineConfig(**options)
    if not isinstance(config, EngineConfig):
        raise ConfigError(f"config is {type(config).__name__}; expected an EngineConfig")
    if options:
        raise ConfigError(f"{next(iter(options))} is given beside an EngineConfig; put it there")
    return config
