"""The models whose shapes come with the package, and where a model's configuration is found."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from emoe_jax.checkpoint.files import CONFIG, fetch_config, is_hub_id
from emoe_jax.config import ModelConfig
from emoe_jax.demo import demo_model
from emoe_jax.errors import CheckpointError, ConfigError
from emoe_jax.models import config_from_directory, config_from_hf
from emoe_jax.option_fields import nearest

_FOLDER = resources.files("emoe_jax.planning") / "models"


def known_models() -> tuple[str, ...]:
    """The names of the models that come with the package, in lower case."""
    return tuple(sorted(file.name.removesuffix(".json") for file in _FOLDER.iterdir() if file.name.endswith(".json")))


def known_model(name: str) -> dict[str, Any]:
    """The keys of a known model's `config.json` that shape it. Raises `ConfigError` with the nearest known name."""
    if name.lower() not in known_models():
        raise ConfigError(
            f"{name[:80]!r} is neither a directory, a config.json, a hub id (owner/name) nor a known model; the "
            f"nearest known one is {nearest(name.lower(), known_models())!r} of {', '.join(known_models())}"
        )
    return json.loads((_FOLDER / f"{name.lower()}.json").read_text(encoding="utf-8"))


def read_config(path: Path) -> ModelConfig:
    """Of a checkpoint directory, or of a `config.json` alone. Raises `CheckpointError` or `ConfigError`."""
    if path.suffix != ".json":
        return config_from_directory(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; expected a JSON object")
    return config_from_hf(raw)


def find_model(text: str) -> tuple[str, ModelConfig]:
    """Name and configuration of what a user called a model: a directory, a `config.json`, a known name, or a hub id, of
    which nothing but the `config.json` is fetched.

    Raises `CheckpointError` or `ConfigError`.
    """
    path = Path(text)
    if text == "demo" and not path.exists():
        path = demo_model()
    if path.is_file() and path.suffix != ".json":
        raise CheckpointError(f"{path} is a file; expected a directory with a config.json, or a config.json")
    if path.exists() or path.suffix == ".json":
        resolved = path.resolve()
        return (resolved.parent.name if resolved.name == CONFIG else resolved.stem), read_config(path)
    if is_hub_id(text):
        return text.rpartition("/")[2].lower(), read_config(_fetched(text))
    return text.lower(), config_from_hf(known_model(text))


def _fetched(hub_id: str) -> Path:
    try:
        return fetch_config(hub_id)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; without a network, give a directory, a config.json or a known model: {', '.join(known_models())}"
        ) from None
