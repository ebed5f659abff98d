"""How good a predicted distribution is, as numbers: coverage under a slot budget, the used set, top-k, divergence."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from emoe_jax.predictor.prompts import frequencies
from emoe_jax.traces.coverage import best_experts, coverage, covered
from train.predictor.objective import BUDGETS, slots


def resident(scores: Shaped[np.ndarray, "P M E"], number: int) -> Bool[np.ndarray, "P M E"]:
    """The best `number` experts of each layer."""
    return best_experts(scores, [number] * scores.shape[1])


def coverage_at(predicted: Float[np.ndarray, "P M E"], counts: Int[np.ndarray, "P M E"], residency: float) -> float:
    """Share of all expert assignments whose expert is resident: long prompts weigh more, as they do in serving."""
    return float(covered(counts, predicted, _even(residency, counts)).sum() / max(1, counts.sum()))


def coverage_by_prompt(
    predicted: Float[np.ndarray, "P M E"], counts: Int[np.ndarray, "P M E"], residency: float
) -> float:
    """The mean of each prompt's coverage."""
    return float(coverage(counts, predicted, _even(residency, counts)).mean())


def coverage_table(predicted: Float[np.ndarray, "P M E"], counts: Int[np.ndarray, "P M E"]) -> dict[str, float]:
    """Coverage by residency; 0 where there is nothing to cover."""
    return {str(residency): coverage_at(predicted, counts, residency) for residency in BUDGETS}


def scores(predicted: Float[np.ndarray, "P M E"], counts: Int[np.ndarray, "P M E"], top_k: int) -> dict[str, Any]:
    """All metrics of a prediction, keyed by residency where they depend on it.

    `precision`, `recall` and `f1` compare the resident set with the experts that the prompt used at all.
    `top_k_accuracy` is the share of a prompt's `top_k` most used experts per layer among the `top_k` predicted (the
    paper's Table 2). `kl` is KL(used || predicted) in nats, mean over prompts and layers.
    """
    used, table = counts > 0, {str(residency): slots(residency, counts.shape[-1]) for residency in BUDGETS}
    result: dict[str, Any] = {
        "coverage": coverage_table(predicted, counts),
        "coverage_by_prompt": {key: coverage_by_prompt(predicted, counts, float(key)) for key in table},
    }
    hits = {key: (resident(predicted, number) & used).sum() for key, number in table.items()}
    precision = {key: float(hits[key] / (number * counts.shape[0] * counts.shape[1])) for key, number in table.items()}
    recall = {key: float(hits[key] / used.sum()) for key in table}
    result["precision"], result["recall"] = precision, recall
    result["f1"] = {key: 2 * precision[key] * recall[key] / max(precision[key] + recall[key], 1e-12) for key in table}
    both = resident(predicted, top_k) & resident(counts.astype(np.float64), top_k) & used
    result["top_k_accuracy"] = float(both.sum() / np.minimum(used.sum(-1), top_k).sum())
    result["kl"] = divergence(frequencies(counts), predicted)
    return result


def _even(residency: float, counts: Int[np.ndarray, "P M E"]) -> list[int]:
    """Every layer's slots."""
    return [slots(residency, counts.shape[-1])] * counts.shape[1]


def divergence(used: Float[np.ndarray, "P M E"], predicted: Float[np.ndarray, "P M E"]) -> float:
    smooth = predicted + 1e-6
    smooth = smooth / smooth.sum(-1, keepdims=True)
    return float((used * (np.log(np.maximum(used, 1e-12)) - np.log(smooth))).sum(-1).mean())
