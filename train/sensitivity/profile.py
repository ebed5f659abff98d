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
_RESAMPLES = 2000


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
    return {name: float(values.mean()) for name, values in by_prompt(resident, other, rows, embed).items()}


def by_prompt(
    resident: Outputs, other: Outputs, rows: Sequence[int], embed: Embed | None = None
) -> dict[str, Float[np.ndarray, " examples"]]:
    """What `similarities` takes the means of."""
    exact = [resident.tokens[row] == other.tokens[row] for row in rows]
    rouge = [
        1.0 if same else rouge_l(resident.texts[row], other.texts[row]) for same, row in zip(exact, rows, strict=True)
    ]
    found = {EXACT: np.array(exact, np.float64), ROUGE: np.array(rouge, np.float64)}
    if embed is not None:
        ours, theirs = (embed([outputs.texts[row] for row in rows]) for outputs in (resident, other))
        found[COSINE] = np.where(exact, 1.0, (ours * theirs).sum(axis=1)).astype(np.float64)
    return found


def interval(values: Float[np.ndarray, " examples"]) -> list[float]:
    """95 % interval of the mean: bootstrap over prompts, with equal draws for equally many of them."""
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    return np.quantile(values[drawn].mean(axis=1), [0.025, 0.975]).tolist()


def deviation_numbers(
    deviation: Deviation, tokens: Int[np.ndarray, " examples"], rows: Sequence[int]
) -> dict[str, float]:
    """Means over the answer tokens of some prompts."""
    chosen = np.asarray(rows)
    weight = tokens[chosen] / tokens[chosen].sum()
    return {
        "kl": float(deviation.kl[chosen] @ weight),
        "kl_error": _standard_error(deviation.kl[chosen], weight),
        "perplexity": float(np.exp(min(deviation.nats[chosen].sum() / tokens[chosen].sum(), 700.0))),
        "token_agreement": float(deviation.agreement[chosen] @ weight),
    }


def _standard_error(values: Float[np.ndarray, " examples"], weights: Float[np.ndarray, " examples"]) -> float:
    """Of the weighted mean over prompts; of a single one it is not known, and taken to be as large as the value."""
    mean = float(values @ weights)
    if len(values) < 2:
        return abs(mean)
    return float(np.sqrt(len(values) / (len(values) - 1) * ((weights * (values - mean)) ** 2).sum()))


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


def by_divergence(
    kl: Float[np.ndarray, "tasks M"], errors: Float[np.ndarray, "tasks M"]
) -> Float[np.ndarray, "tasks M"]:
    """`s` as damage: how much randomising one layer alone harms a task, against randomising its other layers; 1 is the
    largest of any task and layer.

    Only layers of a task are compared, not tasks: eq. 2 would leave a task without experts whose answers suffer little
    from any one layer, though they suffer as much as others from all of them. `errors` are the standard errors of `kl`.
    What is not known well is shrunk towards the layer's mean over tasks (empirical Bayes), by the share that errors
    have in how much tasks differ there.
    """
    scale = np.maximum(kl.mean(1, keepdims=True), 1e-12)
    harm, error = np.maximum(kl, 0) / scale, errors / scale
    mean = harm.mean(0)
    differ = np.maximum(harm.var(0, ddof=1) - (error**2).mean(0), 0) if len(harm) > 1 else np.full_like(mean, np.inf)
    known = np.where(np.isinf(differ), 1, differ / np.maximum(differ + error**2, 1e-24))
    shrunk = known * harm + (1 - known) * mean
    return shrunk / max(float(shrunk.max()), 1e-12)


def patterns(num_layers: int, depths: int) -> tuple[list[Bool[np.ndarray, " M"]], list[Bool[np.ndarray, " M"]]]:
    """Layers to randomise: the first ones, up to `depths` evenly spaced numbers of them; and each layer alone."""
    numbers = sorted({round(num_layers * (step + 1) / depths) for step in range(depths)} - {0})
    return [np.arange(num_layers) < number for number in numbers], list(np.eye(num_layers, dtype=bool))
