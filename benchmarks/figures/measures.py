"""What is drawn: how experts follow each other from layer to layer, and how alike prompts use them.

Two correlations, both Pearson's; which ones the paper took, it does not say:

- Between **layers** (its Fig. 7), over tokens. Experts of two layers have nothing to do with each other by number, so
  what correlates is "the token chose expert i" with "it chose expert j in the next layer" (the phi coefficient). Every
  expert has its strongest follower j; the mean of those over the experts of a layer, weighted by how often each is
  chosen, is the correlation of the two layers. `by_chance` is the same with tokens dealt at random in the next layer:
  a largest of many is above 0 even there.
- Between **prompts** (Figs. 8 and 9), over the experts of a layer: how often one prompt chose each of them with how
  often another did; then the mean over pairs of prompts, and over layers. Experts that every prompt likes make any two
  alike, so there are two more numbers: `any_pair` is of pairs drawn at random, and `beyond_mean` correlates how far the
  two are from the mean of all prompts.

Where all experts were chosen alike, or one always or never, nothing correlates; such pairs are left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from emoe_jax.policies.learning import co_occurrences
from emoe_jax.predictor.prompts import frequencies
from emoe_jax.traces import RoutingTrace
from emoe_jax.traces.coverage import best_experts

_RANDOM_PAIRS = 2000


def strongest_follower(
    together: Int[np.ndarray, "E E"], before: Int[np.ndarray, " E"], after: Int[np.ndarray, " E"], tokens: int
) -> float:
    """The correlation of two layers. `together[i, j]` tokens chose i and then j, `before` and `after` either alone."""
    alone = np.sqrt(1.0 * before * (tokens - before))[:, None] * np.sqrt(1.0 * after * (tokens - after))
    phi = np.full(together.shape, np.nan)
    np.divide(float(tokens) * together - 1.0 * before[:, None] * after, alone, out=phi, where=alone > 0)
    known = ~np.isnan(phi).all(1)
    if not known.any():
        return float("nan")
    return float(np.average(np.nanmax(phi[known], axis=1), weights=before[known]))


def between_layers(trace: RoutingTrace, seed: int = 0) -> dict[str, Any]:
    """Fig. 7: one number per pair of consecutive MoE layers, and their mean."""
    E, N = trace.num_experts, trace.num_tokens
    chosen = trace.counts().sum(0)
    dealt = np.random.default_rng(seed).permutation(N)
    by_layer, by_chance = [], []
    for layer in range(trace.num_layers - 1):
        first, second = trace.experts[:, layer], trace.experts[:, layer + 1]
        for found, following in ((by_layer, second), (by_chance, second[dealt])):
            together = co_occurrences(first, following, E)
            found.append(strongest_follower(together, chosen[layer], chosen[layer + 1], N))
    return {"by_layer": _known(by_layer), "mean": _mean(by_layer), "by_chance": _mean(by_chance)}


def between_prompts(trace: RoutingTrace, distances: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Figs. 8 and 9: consecutive prompts by layer, and each one with its i-th next for every i of `distances`."""
    counts, tasks = _routed(trace)
    shares = frequencies(counts)
    plain, beyond = _directions(shares), _directions(shares - shares.mean(0))
    following = _pairs(plain, np.arange(len(plain) - 1), 1)
    same = tasks[:-1] == tasks[1:]
    rng = np.random.default_rng(seed)
    first = rng.integers(len(plain), size=_RANDOM_PAIRS)
    second = (first + rng.integers(1, len(plain), size=_RANDOM_PAIRS)) % len(plain)
    within = [distance for distance in distances if distance < len(plain)]
    return {
        "consecutive": {
            "by_layer": _known(_nanmean(following, 0)),
            "mean": _mean(following),
            "same_task": _mean(following[same]),
            "other_task": _mean(following[~same]),
            "beyond_mean": _mean(_pairs(beyond, np.arange(len(beyond) - 1), 1)),
        },
        "by_distance": {str(i): _mean(_pairs(plain, np.arange(len(plain) - i), i)) for i in within},
        "beyond_mean_by_distance": {str(i): _mean(_pairs(beyond, np.arange(len(beyond) - i), i)) for i in within},
        "any_pair": _mean((plain[first] * plain[second]).sum(-1)),
    }


def served_by_one(trace: RoutingTrace, shares: Sequence[float], longest: int) -> dict[str, Any]:
    """The routing side of Fig. 10: the experts that a prompt chose most, as many of each layer as are resident, serve
    the next p prompts.

    `coverage[share][p]` is the share of the assignments of those p prompts whose expert is there, over all prompts that
    have p next ones, for p up to `longest` or as far as there are prompts; 0 stands for the prompt itself.
    """
    counts, _ = _routed(trace)
    longest = min(longest, len(counts) - 1)
    totals = counts.sum((1, 2))
    coverage: dict[str, dict[str, float]] = {}
    for share in shares:
        capacity = max(trace.top_k, int(share * trace.num_experts + 1e-9))
        chosen = best_experts(counts, [capacity] * trace.num_layers)
        curve = {"0": float((counts * chosen).sum() / totals.sum())}
        hits, wishes = np.zeros(len(counts), np.int64), np.zeros(len(counts), np.int64)
        for p in range(1, longest + 1):
            serving = len(counts) - p
            hits[:serving] += (counts[p:] * chosen[:serving]).sum((1, 2))
            wishes[:serving] += totals[p:]
            curve[str(p)] = float(hits[:serving].sum() / wishes[:serving].sum())
        coverage[f"{share:g}"] = curve
    return {"coverage": coverage, "longest": longest}


def _routed(trace: RoutingTrace) -> tuple[Int[np.ndarray, "P M E"], Int[np.ndarray, " P"]]:
    """Counts and tasks of the prompts that have any routing, in order of arrival."""
    counts = trace.counts()
    has = counts.sum((1, 2)) > 0
    return counts[has], trace.task[has]


def _directions(shares: Float[np.ndarray, "P M E"]) -> Float[np.ndarray, "P M E"]:
    """Centred and of length 1, so that the product of two is their correlation; NaN where all experts are alike."""
    centred = shares - shares.mean(-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    return np.where(length > 1e-6, centred / np.maximum(length, 1e-6), np.nan)


def _pairs(directions: Float[np.ndarray, "P M E"], first: Int[np.ndarray, " n"], i: int) -> Float[np.ndarray, "n M"]:
    """Correlation of each of these prompts with its i-th next one, by layer."""
    return (directions[first] * directions[first + i]).sum(-1)


def _mean(values: np.ndarray | Sequence[float]) -> float | None:
    """None where nothing is known."""
    return _known([_nanmean(np.asarray(values, np.float64), None)])[0]


def _known(values: np.ndarray | Sequence[float]) -> list[float | None]:
    """As JSON has it: None for NaN."""
    return [None if np.isnan(value) else float(value) for value in values]


def _nanmean(values: np.ndarray, axis: int | None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN, as it should be
        return np.nanmean(values, axis=axis)
