"""Ridge regression with the penalty that predicts left-out rows best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Ridge(NamedTuple):
    """`weights` for new rows; `left_out` is what each row's targets would be predicted to be from the other rows."""

    weights: Float[np.ndarray, "features targets"]
    left_out: Float[np.ndarray, "P targets"]
    penalty: float


def fit_ridge(
    features: Float[np.ndarray, "P features"],
    targets: Float[np.ndarray, "P targets"],
    penalties: Sequence[float],
    weight: Float[np.ndarray, " P"] | None = None,
) -> Ridge:
    """Neither side is centred. A row of twice the `weight` counts twice, in the fit and in choosing the penalty.

    Leaving one row out has a closed form: its error is that of the whole fit over 1 less the row's leverage. Works on
    the smaller of the two Gram matrices.
    """
    root = np.ones((len(features), 1)) if weight is None else np.sqrt(weight)[:, None]
    x, y = features * root, targets * root
    is_wide = x.shape[1] > len(x)
    values, vectors = np.linalg.eigh(x @ x.T if is_wide else x.T @ x)
    values = np.maximum(values, 0)
    # Columns of `basis` are orthogonal, `values` their squared lengths; the fit of each shrinks by value / (value + p).
    basis = vectors * np.sqrt(values) if is_wide else x @ vectors
    cross = basis.T @ y
    best = np.inf
    result: tuple[np.ndarray, np.ndarray, float] | None = None
    for penalty in penalties:
        inverse = 1 / (values + penalty)
        fitted = basis @ (inverse[:, None] * cross)
        leverage = np.minimum((basis**2 @ inverse), 1 - 1e-9)[:, None]
        left_out = (fitted - leverage * y) / (1 - leverage)
        error = float(((y - left_out) ** 2).sum())
        if error < best or result is None:
            best, result = error, (inverse, left_out, float(penalty))
    assert result is not None
    inverse, left_out, penalty = result
    if is_wide:
        weights = x.T @ (vectors @ (inverse[:, None] * (vectors.T @ y)))
    else:
        weights = vectors @ (inverse[:, None] * cross)
    return Ridge(weights, left_out / root, penalty)
