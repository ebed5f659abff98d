"""`Dynamics`: how an answer's wishes go on, learned from a trace. A forecast of the next few steps.

Two linear parts and a network. Per expert: a weighted sum of its planned rate and of decayed means of its wishes.
Across experts and layers: how wishes deviate from the plan is projected onto the directions in which it varies most,
decayed means of which tell every layer what is coming. The last layers know the next token before the first ones see
it, so the choices of one token say much about the next one's. The network (`AnswerNetwork`) forecasts the same from the
same; of a single request the mean of both forecasts counts.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from emoe_jax.errors import ConfigError
from emoe_jax.policies.answer import AnswerNetwork

DYNAMICS_FILE = "dynamics.npz"
"""Its name in a predictor's directory."""
FORMAT = 2
"""Of the file. Another one is refused."""
HALF_LIVES = (1.0, 4.0, 16.0, 64.0)
LATENT_HALF_LIVES = (1.0, 4.0, 16.0, 64.0)
# Least squares on 264 prompts of the gpt-oss-20b trace; for what has no dynamics of its own.
_WEIGHTS = (0.08, 0.07, 0.05, 0.37, 0.43)
_RELEARN = "`python -m train.predictor --traces FILE --out DIR` writes it anew"


class Dynamics(NamedTuple):
    """Half-lives are in steps. Without directions (`r` = 0) nothing is told across experts."""

    top_k: int
    half_lives: Float[np.ndarray, " half_lives"]
    weights: Float[np.ndarray, " 1+half_lives"]  # of the planned rate, then of each decayed mean
    latent_half_lives: Float[np.ndarray, " latent_half_lives"]
    directions: Float[np.ndarray, "ME r"]
    readout: Float[np.ndarray, "latent ME"]
    network: AnswerNetwork | None = None

    @staticmethod
    def untrained(num_layers: int, num_experts: int) -> Dynamics:
        """Decayed means only, with weights that are not of this model."""
        size = num_layers * num_experts
        return Dynamics(
            1,
            np.array(HALF_LIVES, np.float32),
            np.array(_WEIGHTS, np.float32),
            np.array(LATENT_HALF_LIVES, np.float32),
            np.zeros((size, 0), np.float32),
            np.zeros((0, size), np.float32),
        )

    @property
    def keep(self) -> Float[np.ndarray, " half_lives"]:
        """What a decayed mean keeps of itself in one step; the rest is the new value's."""
        return 0.5 ** (1 / self.half_lives)

    @property
    def latent_keep(self) -> Float[np.ndarray, " latent_half_lives"]:
        """The factor by which each latent mean decays in one step, `0.5 ** (1 / half-life)`."""
        return 0.5 ** (1 / self.latent_half_lives)

    def save(self, path: str | Path) -> None:
        """Matrices are written in half precision."""
        arrays = {name: value for name, value in self._asdict().items() if name != "network"}
        if self.network is not None:
            arrays |= {f"network_{name}": value for name, value in self.network._asdict().items()}
        halved: dict[str, Any] = {name: _halved(np.asarray(value)) for name, value in arrays.items()}
        with Path(path).open("wb") as file:
            np.savez(file, format=np.int32(FORMAT), **halved)

    @staticmethod
    def load(path: str | Path, num_layers: int, num_experts: int) -> Dynamics:
        """Raises `ConfigError`, one line, where the file is missing, damaged, of another format or model."""
        try:
            with Path(path).open("rb") as file:
                archive = np.load(file, allow_pickle=False)
                arrays: dict[str, Any] = {name: archive[name].astype(np.float32) for name in archive.files}
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; it should hold the dynamics of routing") from None
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(f"{path} holds no dynamics of routing: {' '.join(str(error).split())}") from None
        if int(arrays.pop("format", np.ones(()))) != FORMAT:
            raise ConfigError(f"{path} holds dynamics of an older format than {FORMAT}; {_RELEARN}")
        network_arrays = {name: arrays.pop(name) for name in [*arrays] if name.startswith("network_")}
        try:
            arrays["top_k"] = int(arrays["top_k"])
            network = None
            if network_arrays:
                network = AnswerNetwork(*(network_arrays[f"network_{name}"] for name in AnswerNetwork._fields))
            dynamics = Dynamics(**arrays, network=network)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path} holds no dynamics of routing: {error}") from None
        dynamics._check(path, num_layers, num_experts)
        return dynamics

    def _check(self, path: str | Path, num_layers: int, num_experts: int) -> None:
        size, (rows, r) = num_layers * num_experts, np.atleast_2d(self.directions).shape
        latent = len(np.atleast_1d(self.latent_half_lives)) * r
        if rows != size or self.readout.shape != (latent, size):
            raise ConfigError(
                f"{path} holds dynamics of {rows} experts in all; the model has {num_layers} MoE layers of "
                f"{num_experts} experts"
            )
        if self.weights.shape != (1 + len(self.half_lives),):
            raise ConfigError(f"{path} holds {len(self.weights)} weights for {len(self.half_lives)} half-lives")
        if self.network is not None:
            hidden = self.network.up.shape[-1]
            shapes = AnswerNetwork((size,), (size,), (latent, size), (latent, hidden), (hidden,), (hidden, size))
            for name, array, shape in zip(AnswerNetwork._fields, self.network, shapes, strict=True):
                if array.shape != shape:
                    raise ConfigError(f"{path}: the network's {name} is {list(array.shape)}, not {list(shape)}")


def _halved(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16) if array.ndim > 1 else array
