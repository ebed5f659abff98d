"""Which starts were warmed up whole before, so that JAX's cache has all that they would compile."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import jax

import emoe_jax
from emoe_jax import Engine
from emoe_jax.engine_config import EngineConfig
from emoe_jax.option_fields import options_of


class WarmStart:
    """A note beside JAX's cache: a start of the same engine, by the same code, was warmed up whole.

    Without a cache there is nothing to note.
    """

    def __init__(self, engine: Engine):
        cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        self._path = Path(cache) / f"warmed-up-{_digest(engine)}.json" if cache else None

    def workspace_bytes(self) -> int | None:
        """What its steps were found to take of the device beside slab and KV cache; None for a start that is new."""
        if self._path is None:
            return None
        try:
            return int(json.loads(self._path.read_text(encoding="utf-8"))["workspace_bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note(self, workspace_bytes: int) -> None:
        """The warm-up is over. A folder that cannot be written is none of a server's business."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({"workspace_bytes": workspace_bytes}), encoding="utf-8")
        except OSError:
            return

    def forget(self) -> None:
        """The cache has lost something."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _digest(engine: Engine) -> str:
    """Of all that decides what is compiled: versions, devices, the engine's options and code, the model's shapes."""
    told = {option.name: getattr(engine.options, option.name) for option in options_of(EngineConfig)}
    devices = [(device.platform, device.device_kind) for device in jax.devices()]
    described = [version("jax"), version("jaxlib"), devices, told, repr(engine.config)]
    digest = hashlib.sha256(json.dumps(described, default=str, sort_keys=True).encode())
    for path in sorted(Path(emoe_jax.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
