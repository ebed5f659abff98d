"""Similarity of answers by meaning: an embedding model, where sentence-transformers is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from emoe_jax.errors import ConfigError

Embed = Callable[[Sequence[str]], Float[np.ndarray, "n d"]]
"""One row per text, of length 1."""


def embedding_model(name: str) -> Embed:
    """The model of this hub id or directory; no remote code, safetensors only. Raises `ConfigError`."""
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("--embedding-model needs sentence-transformers: pip install sentence-transformers") from None
    try:
        model = SentenceTransformer(name, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except Exception as error:  # it raises whatever its dependencies raise
        raise ConfigError(f"embedding model {name!r} cannot be loaded: {' '.join(str(error).split())}") from None

    def embed(texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        return np.asarray(model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False))

    return embed
