"""`LayerPrior`: what a prompt's routing in the layers so far says of the layers to come, in closed form."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from emoe_jax.predictor.config import PredictorConfig, PredictorError
from emoe_jax.predictor.prior import compress, distribution
from emoe_jax.predictor.prompts import frequencies
from emoe_jax.predictor.regression import fit_ridge

_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of a prompt's squared deviation
_MAX_WEIGHT = 4.0  # of a prompt, against the median one


class LayerPrior:
    """Ridge regression of how each layer deviates from the prior on how all earlier layers do.

    Expert numbers mean nothing across layers, so every layer has a matrix of its own for every earlier one. Frequencies
    are regressed as the prior regresses them (`compress`).
    """

    def __init__(self, matrices: list[Float[np.ndarray, "earlier_ME E"]], noise_tokens: float, usual_tokens: float):
        """`matrices[m]` is layer m's, of `m * E` rows. After `noise_tokens` tokens a deviation from the prior is as
        much chance as not; the matrices were fitted to prompts of `usual_tokens`."""
        self.matrices, self._noise, self._usual = matrices, noise_tokens, usual_tokens

    @staticmethod
    def ignorant(config: PredictorConfig) -> LayerPrior:
        """What earlier layers say does not count."""
        E = config.num_experts
        return LayerPrior([np.zeros((E * layer, E), np.float32) for layer in range(config.num_layers)], 1.0, 1.0)

    @staticmethod
    def fit(
        prior: Float[np.ndarray, "P M E"], counts: Int[np.ndarray, "P M E"], top_k: int
    ) -> tuple[LayerPrior, Float[np.ndarray, "P M E"]]:
        """From the prior's word on prompts that it had not seen. Also returns each prompt's distribution given its own
        earlier layers, as learned from the other prompts."""
        shares, size = frequencies(counts), counts.sum((1, 2)).astype(np.float64)
        weight = np.clip(size / np.median(size), 1 / _MAX_WEIGHT, _MAX_WEIGHT)
        start = compress(prior).astype(np.float64)
        deviation = compress(shares) - start
        P, M, E = counts.shape
        matrices, left_out = [np.zeros((0, E), np.float32)], np.array(start)
        for layer in range(1, M):
            features = deviation[:, :layer].reshape(P, -1)
            each = float((weight @ features**2).sum() / P)
            ridge = fit_ridge(features, deviation[:, layer], [each * penalty for penalty in _PENALTIES], weight)
            matrices.append(ridge.weights.astype(np.float32))
            left_out[:, layer] += ridge.left_out
        tokens = size / (M * top_k)
        chance = (shares * (1 - shares)).sum(-1) / top_k  # of one token's shares
        real = np.maximum(((shares - prior) ** 2).sum(-1) - chance / tokens[:, None], 1e-6)
        return LayerPrior(matrices, float(chance.mean() / real.mean()), float(np.median(tokens))), distribution(
            left_out
        )

    def predict(
        self,
        prior: Float[np.ndarray, "B M E"],
        shares: Float[np.ndarray, "B M E"],
        known: int | None = None,
        tokens: float | None = None,
    ) -> Float[np.ndarray, "B M E"]:
        """Each layer's distribution given the routing `shares` of all earlier layers.

        With `known`, only so many layers were routed yet: later `shares` are not looked at, and those layers are
        expected to deviate as predicted. `tokens` is how many `shares` count; a whole prompt's where it is not given.
        """
        start = compress(prior)
        deviation = (compress(shares) - start) * np.float32(self._trust(tokens))
        if known is not None:
            deviation[:, known:] = 0
        result = np.array(start)
        for layer in range(1, prior.shape[1]):
            more = deviation[:, :layer].reshape(len(prior), -1) @ self.matrices[layer]
            result[:, layer] += more
            if known is not None and layer >= known:
                deviation[:, layer] = more
        return distribution(result)

    def _trust(self, tokens: float | None) -> float:
        """How much a deviation seen over so many tokens counts, against one over a whole prompt."""
        if tokens is None or tokens >= self._usual:
            return 1.0
        return tokens / (tokens + self._noise) * (self._usual + self._noise) / self._usual

    def save(self, path: Path) -> None:
        """Matrices are written in half precision."""
        with path.open("wb") as file:
            matrices = np.concatenate(self.matrices).astype(np.float16)
            np.savez_compressed(file, matrices=matrices, tokens=np.array([self._noise, self._usual]))

    @staticmethod
    def load(path: Path, config: PredictorConfig) -> LayerPrior:
        """Raises `PredictorError` where the file is missing, damaged or of another model."""
        try:
            with path.open("rb") as file:
                archive = np.load(file, allow_pickle=False)
                matrices, tokens = archive["matrices"].astype(np.float32), archive["tokens"]
        except FileNotFoundError:
            raise PredictorError(f"{path.parent} holds no whole predictor ({path.name} is missing)") from None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise PredictorError(f"{path} is damaged: {' '.join(str(error).split())}") from None
        E, M = config.num_experts, config.num_layers
        shape = (E * M * (M - 1) // 2, E)
        if matrices.shape != shape or tokens.shape != (2,):
            raise PredictorError(f"{path} holds matrices of shape {list(matrices.shape)}, it should be {list(shape)}")
        ends = np.cumsum([E * layer for layer in range(M)])
        return LayerPrior(np.split(matrices, ends[:-1]), *tokens.tolist())
