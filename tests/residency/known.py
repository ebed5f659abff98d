"""What an engine over the tiny checkpoint may know before its first request: shares, profiles, predictors."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from emoe_jax.predictor import Predictor, PredictorConfig, Prompts, network
from tests.engines import TINY

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def favouring(*experts: int) -> Float[np.ndarray, "M E"]:
    """Shares, 95 % of which go to these experts in every layer."""
    shares = np.full((LAYERS, EXPERTS), 0.05 / EXPERTS)
    shares[:, experts] += 0.95 / len(experts)
    return shares


def write_predictor(
    folder: Path,
    tasks: Sequence[str],
    shares: Sequence[Float[np.ndarray, "M E"]],
    embeddings: Float[np.ndarray, "P D"] | None = None,
    opinionated: bool = False,
) -> Path:
    """A predictor that remembers prompts of these tasks which used experts in these shares. Its networks repeat the
    prior, unless it is `opinionated`: then what they make of their inputs is arbitrary.
    """
    config = PredictorConfig(LAYERS, EXPERTS, TOP_K, embedding_dim=TINY["hidden_size"], width=8, heads=2, members=1)
    counts = np.stack([(100 * of).astype(np.int32) for of in shares])
    if embeddings is None:
        embeddings = np.eye(len(tasks), TINY["hidden_size"], dtype=np.float32)
    predictor = Predictor(config, Prompts(tuple(tasks), embeddings, counts, counts))
    predictor.weights = network.init(config, predictor.sizes, 0)
    if opinionated:
        keys = jax.random.split(jax.random.key(0), len(predictor.weights))
        predictor.weights = {
            name: value + jax.random.normal(key, value.shape) * float(name.startswith("head"))
            for key, (name, value) in zip(keys, predictor.weights.items(), strict=True)
        }
    predictor.save(folder)
    return folder
