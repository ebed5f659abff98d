"""`TokenPrior`: the prior corrected by what the prompt's tokens say, in closed form."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from emoe_jax.predictor.config import PredictorConfig, PredictorError
from emoe_jax.predictor.prompts import frequencies
from emoe_jax.predictor.regression import fit_ridge
from emoe_jax.predictor.tokens import LENGTHS, Tokens, TokenTable

_PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of a prompt's squared features
_CONSTANT = 0.3  # a feature that is the same for all prompts
_MAX_WEIGHT = 4.0  # of a prompt, against the median one
_FLOOR = 1e-4

Shares = Float[np.ndarray, "P M E"]


class TokenPrior:
    """A prompt's shares are those that its tokens say, plus what the prior tells of the rest: answer and context.

    That rest is a ridge regression on the prior and the tokens' shares, both in the table's directions. It is another
    one (`rests[1]`) once the prior has seen the first answer tokens.
    """

    def __init__(self, table: TokenTable, rests: Sequence[Float[np.ndarray, "features ME"]]):
        self.table, self._rests = table, tuple(rests)

    @staticmethod
    def fit(
        table: TokenTable, said: Shares, priors: Sequence[Shares], counts: Int[np.ndarray, "P M E"]
    ) -> tuple[TokenPrior, list[Shares]]:
        """From what the tokens `said` and the priors expected of prompts that they had not seen. Also returns each
        prompt's shares as learned from the other prompts, one for each of the `priors`."""
        size = counts.sum((1, 2)).astype(np.float64)
        weight = np.clip(size / np.median(size), 1 / _MAX_WEIGHT, _MAX_WEIGHT)
        missing = (frequencies(counts) - said).reshape(len(said), -1).astype(np.float64)
        rests, left_out = [], []
        for prior in priors:
            features = _features(table, said, prior)
            each = float((weight @ features**2).sum() / len(features))
            ridge = fit_ridge(features, missing, [each * penalty for penalty in _PENALTIES], weight)
            rests.append(ridge.weights.astype(np.float32))
            left_out.append(_distribution(said + ridge.left_out.reshape(said.shape)))
        return TokenPrior(table, rests), left_out

    def predict(self, tokens: Sequence[Tokens], prior: Shares, with_first: bool) -> Shares:
        """Distributions of prompts that hold these tokens; the prior's own for one without tokens."""
        return self.corrected(self.table.shares(tokens), [len(ids) for ids in tokens], prior, with_first)

    def corrected(self, said: Shares, lengths: Sequence[int], prior: Shares, with_first: bool) -> Shares:
        """`predict`, given what the tokens say."""
        rest = _features(self.table, said, prior) @ self._rests[with_first]
        has_tokens = (np.asarray(lengths) > 0)[:, None, None]
        return np.where(has_tokens, _distribution(said + rest.reshape(said.shape)), prior).astype(np.float32)

    def save(self, path: Path) -> None:
        """Write the table and both regressions to one compressed `.npz`. The regressions are rounded to float16."""
        arrays: dict[str, Any] = {"rests": np.stack(self._rests).astype(np.float16), **self.table.arrays()}
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @staticmethod
    def load(path: Path, config: PredictorConfig) -> TokenPrior:
        """Raises `PredictorError` where the file is missing, damaged or of another model."""
        names = ("mean", "basis", *(f"{name}{n}" for n in range(1, LENGTHS + 1) for name in TokenTable.LEVEL))
        try:
            with path.open("rb") as file:
                archive = np.load(file, allow_pickle=False)
                arrays = {name: archive[name] for name in names}
                table, rests = TokenTable.of_arrays(arrays), archive["rests"].astype(np.float32)
        except FileNotFoundError:
            raise PredictorError(f"{path.parent} holds no whole predictor ({path.name} is missing)") from None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise PredictorError(f"{path} is damaged: {' '.join(str(error).split())}") from None
        found, wanted = arrays["mean"].shape, (config.num_layers, config.num_experts)
        size = wanted[0] * wanted[1]
        if found != wanted or arrays["basis"].shape[1:] != (size,):
            raise PredictorError(f"{path} is of routing {list(found)}, it should be {list(wanted)}")
        if rests.shape != (2, 2 * len(arrays["basis"]) + 1, size):
            raise PredictorError(f"{path} is damaged: its arrays do not belong together")
        return TokenPrior(table, list(rests))


def _features(table: TokenTable, said: Shares, prior: Shares) -> Float[np.ndarray, "P features"]:
    constant = np.full((len(said), 1), _CONSTANT, np.float32)
    return np.concatenate([table.coordinates(said), table.coordinates(prior), constant], axis=1)


def _distribution(shares: Float[np.ndarray, "P M E"]) -> Shares:
    shares = np.maximum(shares, _FLOOR)
    return (shares / shares.sum(-1, keepdims=True)).astype(np.float32)
