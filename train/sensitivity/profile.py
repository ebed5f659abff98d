"""From answers and deviations to numbers per task and layer, and to `s` of eMoE eq. 2."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from train.sensitivity.embedding import Embed
from train.sensitivity.measure import Deviation
from train.similarity import rouge_l

EXACT, ROUGE, COSINE = "exact_match", "rouge_l", "cosine"


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Answers of one model to the same prompts: as tokens, and as text."""

    tokens: list[list[int]]
    texts: list[str]


def similarities(
    resident: Outputs, other: Outputs, rows: Sequence[int], embed: Embed | None = None
) -> dict[str, float]:
    """Means over some prompts: equal answers, ROUGE-L F1 of words, and the cosine of embeddings if there is a model of
    them; two empty answers are equal.
    """
    exact = [resident.tokens[row] == other.tokens[row] for row in rows]
    rouge = [
        1.0 if same else rouge_l(resident.texts[row], other.texts[row]) for same, row in zip(exact, rows, strict=True)
    ]
    found = {EXACT: float(np.mean(exact)), ROUGE: float(np.mean(rouge))}
    if embed is not None:
        ours, theirs = (embed([outputs.texts[row] for row in rows]) for outputs in (resident, other))
        found[COSINE] = float(np.mean(np.where(exact, 1.0, (ours * theirs).sum(axis=1))))
    return found


def deviation_numbers(deviation: Deviation, tokens: Int[np.ndarray, " X"], rows: Sequence[int]) -> dict[str, float]:
    """Means over the answer tokens of some prompts."""
    chosen = np.asarray(rows)
    weight = tokens[chosen] / tokens[chosen].sum()
    return {
        "kl": float(deviation.kl[chosen] @ weight),
        "perplexity": float(np.exp(min(deviation.nats[chosen].sum() / tokens[chosen].sum(), 700.0))),
        "token_agreement": float(deviation.agreement[chosen] @ weight),
    }


def insensitive_layers(progressive: Sequence[dict[str, Any]], threshold: float) -> int:
    """How many layers from the input side may all be routed at random while similarity stays at the threshold.

    Observation 3 of the eMoE paper. `progressive` is in ascending order of depth.
    """
    layers = 0
    for row in progressive:
        if row["similarity"] < threshold:
            break
        layers = row["layers"]
    return layers


def by_threshold(insensitive: int, num_layers: int) -> Float[np.ndarray, " M"]:
    """`s` of eMoE section 1.4: 0 in the insensitive layers, 1 in the others."""
    return (np.arange(num_layers) >= insensitive).astype(float)


def by_divergence(kl: Float[np.ndarray, "tasks M"]) -> Float[np.ndarray, "tasks M"]:
    """`s` as damage: the KL of randomising one layer alone, over the largest of any task and layer.

    So that eq. 2 sums, over tasks, tokens times the harm of serving one of them by a wrong expert.
    """
    return np.maximum(kl, 0) / max(float(kl.max()), 1e-12)


def patterns(num_layers: int, depths: int) -> tuple[list[Bool[np.ndarray, " M"]], list[Bool[np.ndarray, " M"]]]:
    """Layers to randomise: the first ones, up to `depths` evenly spaced numbers of them; and each layer alone."""
    numbers = sorted({round(num_layers * (step + 1) / depths) for step in range(depths)} - {0})
    return [np.arange(num_layers) < number for number in numbers], list(np.eye(num_layers, dtype=bool))
