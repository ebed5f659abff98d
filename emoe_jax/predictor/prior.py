"""The closed-form prior: kernel regression on remembered prompts, its noise chosen per direction of routing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from emoe_jax.predictor.kernel import Placed, PromptKernel, radial
from emoe_jax.predictor.prompts import Prompts, frequencies

# Frequencies are regressed as f ** POWER: a root makes rare experts count, which coverage at many slots needs, and
# f itself is what coverage at few slots needs; this is between.
POWER = 0.7
_NOISES = np.geomspace(0.01, 3000, 22)  # the last switches a component off
_WIDTHS = (1.0, 1.6, 2.6, 4.2)  # of the kernel; the one that predicts left-out prompts best is taken
_COMPONENTS = 150
_MEAN_WEIGHT = 10.0  # a constant in the kernel, so that the mean is fitted too
_ALIKE_COMPONENTS, _ALIKE_WIDTH2, _ALIKE_WEIGHT = 15, 0.25, 0.3
_FLOOR = 1e-4
_MAX_WEIGHT = 4.0  # of a prompt, against the median one


class Fit(NamedTuple):
    """Kernel regression of `r` routing components on `P` prompts."""

    weights: Float[np.ndarray, "P r"]
    left_out: Float[np.ndarray, "P r"]  # each prompt's components predicted from the others
    error: float  # mean square of what those miss, summed over components


class KernelPrior:
    """Predicts a prompt's expert frequencies from those of prompts like it.

    Routing is centred and rotated to its principal components, and each component gets the noise that predicts
    left-out prompts best: the leading ones hardly any, the last ones so much that they vanish. A second regression
    adds to the similarity how alike two prompts' *predicted* routing is.
    """

    def __init__(self, kernel: PromptKernel, prompts: Prompts, with_first: bool, width: float | None = None):
        """`width` of the kernel is chosen where it is not given."""
        self._kernel, self._placed, self._with_first = kernel, kernel.place(prompts), with_first
        self._shape = prompts.counts.shape[1:]
        targets = compress(frequencies(prompts.counts)).reshape(len(prompts), -1).astype(np.float64)
        size = prompts.counts.sum((1, 2)).astype(np.float64)
        weight = np.clip(size / np.median(size), 1 / _MAX_WEIGHT, _MAX_WEIGHT)
        self._mean = weight @ targets / weight.sum()
        _, _, axes = np.linalg.svd((targets - self._mean) * np.sqrt(weight)[:, None], full_matrices=False)
        self._axes = axes[:_COMPONENTS]
        components = (targets - self._mean) @ self._axes.T
        widths = _WIDTHS if width is None and kernel.dim else (width or 1.0,)
        fits = {width: _fit(self._similarity(self._placed, width), components, weight) for width in widths}
        self.width = min(fits, key=lambda width: fits[width].error)
        self._first = fits[self.width]
        similarity = self._similarity(self._placed, self.width)
        error = np.sqrt(((components - self._first.left_out) ** 2).mean(0))
        self._alike_scale = 1 / np.maximum(error[:_ALIKE_COMPONENTS], 1e-9)
        at = self._first.left_out[:, :_ALIKE_COMPONENTS] * self._alike_scale
        squares = ((at[:, None] - at[None]) ** 2).sum(-1)
        self._alike_scale = self._alike_scale / np.sqrt(max(float(np.median(squares)), 1e-9) * _ALIKE_WIDTH2)
        self._alike = self._first.left_out[:, :_ALIKE_COMPONENTS] * self._alike_scale
        self._second = _fit(similarity + _ALIKE_WEIGHT * radial(self._alike, self._alike), components, weight)

    def left_out(self) -> Float[np.ndarray, "P M E"]:
        """Every remembered prompt's distribution as predicted from the others."""
        return self._distribution(self._second.left_out)

    def predict(self, prompts: Prompts) -> Float[np.ndarray, "others M E"]:
        """Distributions over experts, each layer's summing to 1. `prompts.counts` are not looked at."""
        placed = self._kernel.place(prompts)
        similarity = self._similarity(placed, self.width)
        rough = similarity @ self._first.weights
        at = rough[:, :_ALIKE_COMPONENTS] * self._alike_scale
        return self._distribution((similarity + _ALIKE_WEIGHT * radial(at, self._alike)) @ self._second.weights)

    def _similarity(self, placed: Placed, width: float) -> Float[np.ndarray, "others P"]:
        return self._kernel.similarity(placed, self._placed, self._with_first, width) + _MEAN_WEIGHT

    def _distribution(self, components: Float[np.ndarray, "others r"]) -> Float[np.ndarray, "others M E"]:
        return distribution((components @ self._axes + self._mean).reshape(-1, *self._shape))


def compress(shares: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
    """As what frequencies are regressed."""
    return shares**POWER


def distribution(compressed: Float[np.ndarray, "*lead E"]) -> Float[np.ndarray, "*lead E"]:
    """Shares that sum to 1, none of them 0, from what was regressed."""
    shares = np.maximum(compressed, 0) ** (1 / POWER) + _FLOOR
    return (shares / shares.sum(-1, keepdims=True)).astype(np.float32)


def _fit(
    similarity: Float[np.ndarray, "P P"], components: Float[np.ndarray, "P r"], weight: Float[np.ndarray, " P"]
) -> Fit:
    """Ridge in the kernel's space with a noise per component; a prompt of twice the `weight` has half of it.

    Leaving one prompt out has a closed form: with A = (K + noise / weight)^-1, the error at prompt i is
    (A z)_i / A_ii. Errors count by weight too, since coverage counts assignments.
    """
    root = np.sqrt(weight)
    values, vectors = np.linalg.eigh(similarity * root[:, None] * root)
    values = np.maximum(values, 0)
    rotated = vectors.T @ (components * root[:, None])
    best_error = np.full(components.shape[1], np.inf)
    weights, left_out = np.empty_like(components), np.empty_like(components)
    for noise in _NOISES:
        inverse = 1 / (values + noise)
        solved = (vectors @ (inverse[:, None] * rotated)) * root[:, None]
        residual = solved / ((vectors**2 @ inverse) * weight)[:, None]
        error = weight @ residual**2 / len(weight)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        weights[:, better] = solved[:, better]
        left_out[:, better] = (components - residual)[:, better]
    return Fit(weights, left_out, float(best_error.sum()))
