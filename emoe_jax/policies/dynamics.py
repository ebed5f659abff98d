"""`Dynamics`: how wishes go on, learned from a trace. A linear forecast of the next few steps.

Two parts. Per expert: a weighted sum of its planned rate and of decayed means of its wishes. Across experts and layers:
how wishes deviate from the plan is projected onto the directions in which it varies most, decayed means of which tell
every layer what is coming. The last layers know the next token before the first ones see it, so the choices of one
token say much about the next one's.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from emoe_jax.errors import ConfigError

DYNAMICS_FILE = "dynamics.npz"
"""Its name in a predictor's directory."""
HALF_LIVES = (2.0, 8.0, 32.0, 128.0)
LATENT_HALF_LIVES = (1.0, 4.0)
# Least squares on 264 prompts of the gpt-oss-20b trace; for what has no dynamics of its own.
_WEIGHTS = (0.15, 0.1, 0.05, 0.62, 0.08)


class Dynamics(NamedTuple):
    """Half-lives are in steps. Without directions (`r` = 0) nothing is told across experts."""

    half_lives: Float[np.ndarray, " K"]
    weights: Float[np.ndarray, " 1+K"]  # of the planned rate, then of each decayed mean
    latent_half_lives: Float[np.ndarray, " J"]
    directions: Float[np.ndarray, "ME r"]
    readout: Float[np.ndarray, "Jr ME"]

    @staticmethod
    def untrained(num_layers: int, num_experts: int) -> Dynamics:
        """Decayed means only, with weights that are not of this model."""
        size = num_layers * num_experts
        return Dynamics(
            np.array(HALF_LIVES, np.float32),
            np.array(_WEIGHTS, np.float32),
            np.array(LATENT_HALF_LIVES, np.float32),
            np.zeros((size, 0), np.float32),
            np.zeros((0, size), np.float32),
        )

    @property
    def keep(self) -> Float[np.ndarray, " K"]:
        """What a decayed mean keeps of itself in one step; the rest is the new value's."""
        return 0.5 ** (1 / self.half_lives)

    @property
    def latent_keep(self) -> Float[np.ndarray, " J"]:
        return 0.5 ** (1 / self.latent_half_lives)

    def save(self, path: str | Path) -> None:
        with Path(path).open("wb") as file:
            np.savez(file, **self._asdict())

    @staticmethod
    def load(path: str | Path, num_layers: int, num_experts: int) -> Dynamics:
        """Raises `ConfigError`, one line, where the file is missing, damaged or of another model."""
        try:
            with Path(path).open("rb") as file:
                archive = np.load(file, allow_pickle=False)
                dynamics = Dynamics(*(archive[name].astype(np.float32) for name in Dynamics._fields))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; it should hold the dynamics of routing") from None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(f"{path} holds no dynamics of routing: {' '.join(str(error).split())}") from None
        size, (rows, r) = num_layers * num_experts, np.atleast_2d(dynamics.directions).shape
        latent = len(np.atleast_1d(dynamics.latent_half_lives)) * r
        if rows != size or dynamics.readout.shape != (latent, size):
            raise ConfigError(
                f"{path} holds dynamics of {rows} experts in all; the model has {num_layers} MoE layers of "
                f"{num_experts} experts"
            )
        if dynamics.weights.shape != (1 + len(dynamics.half_lives),):
            raise ConfigError(f"{path} holds {len(dynamics.weights)} weights for {len(dynamics.half_lives)} half-lives")
        return dynamics
