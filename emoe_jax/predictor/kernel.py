"""How alike two prompts are, before and after their first answer tokens: what the prior interpolates with."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from emoe_jax.predictor.prompts import Prompts, frequencies

# Weight of the task's name in the similarity; an embedding equal to another's adds 1.
_NAME = 0.3
# (power of the embedding's spectrum, width relative to its spread): 1 is the plain distance, 2 looks at the leading
# directions, which is where prompts that route alike are close.
_SHAPES = ((1.0, 0.65), (2.0, 0.6))
_FIRST_WEIGHT, _FIRST_WIDTH2 = 4.0, 1.4


class Placed(NamedTuple):
    """Prompts as points; a `PromptKernel` makes them and compares only its own."""

    names: Float[np.ndarray, "P name_parts"]
    embedded: Bool[np.ndarray, " P"]
    at: list[Float[np.ndarray, "P r"]]  # by embedding, once per shape
    first: Float[np.ndarray, "P ME"]


class PromptKernel:
    """Similarity of prompts, with every scale taken from the `prompts` it is made for.

    The sum of: same task name, same part of it before the first `/`, shared words of it; radial functions of the
    embeddings' distance; and, where asked for, one of the distance between the first tokens' routing.
    """

    def __init__(self, prompts: Prompts):
        names = sorted(set(prompts.tasks))
        self._vocabulary = {
            part: i for i, part in enumerate(sorted({p for name in names for p, _ in name_parts(name)}))
        }
        unit = unit_rows(prompts.embedding)
        self._mean = unit.sum(0) / max(1, int(has_embedding(prompts).sum()))
        centred = (unit - self._mean) * has_embedding(prompts)[:, None]
        _, spectrum, basis = np.linalg.svd(centred, full_matrices=False)
        rank = int((spectrum > 1e-4 * spectrum.max(initial=0)).sum())
        self._basis, self._spectrum = basis[:rank], spectrum[:rank]
        self.dim = rank
        coordinates = self.coordinates(prompts)
        self._scales = []
        for power, width in _SHAPES if rank else ():
            scale = self._spectrum ** (power - 1)
            spread = np.sqrt(((coordinates * scale) ** 2).sum(1).mean())
            self._scales.append(scale / (spread * width))
        first = _first_roots(prompts)
        self._first_mean = first.mean(0)
        self._first_scale = max(float(np.sqrt(((first - self._first_mean) ** 2).sum(1).mean())), 1e-6)

    def names(self, tasks: Sequence[str]) -> Float[np.ndarray, "P name_parts"]:
        """Weighted parts of the task names; parts never seen are left out."""
        rows = np.zeros((len(tasks), len(self._vocabulary)), np.float32)
        for row, task in zip(rows, tasks, strict=True):
            for part, weight in name_parts(task):
                if part in self._vocabulary:
                    row[self._vocabulary[part]] += weight
        return rows

    def coordinates(self, prompts: Prompts) -> Float[np.ndarray, "P r"]:
        """Embeddings in their principal directions; zero where a prompt has none."""
        return ((unit_rows(prompts.embedding) - self._mean) * has_embedding(prompts)[:, None]) @ self._basis.T

    def place(self, prompts: Prompts) -> Placed:
        """The features of the prompts that `similarity` compares."""
        at = self.coordinates(prompts)
        first = (_first_roots(prompts) - self._first_mean) / (self._first_scale * np.sqrt(_FIRST_WIDTH2))
        return Placed(self.names(prompts.tasks), has_embedding(prompts), [at * scale for scale in self._scales], first)

    def similarity(
        self, left: Placed, right: Placed, with_first: bool, width: float = 1.0
    ) -> Float[np.ndarray, "P others"]:
        """Of every pair. `width` stretches the radial functions: a wide one is nearly linear."""
        similarity = _NAME * left.names @ right.names.T
        if left.at:
            both = np.outer(left.embedded, right.embedded) / len(left.at)
            for here, there in zip(left.at, right.at, strict=True):
                similarity = similarity + both * radial(here / width, there / width)
        if with_first:
            similarity = similarity + _FIRST_WEIGHT * radial(left.first / width, right.first / width)
        return similarity.astype(np.float64)


def name_parts(name: str) -> list[tuple[str, float]]:
    """A task name's features and their weights: `mmlu/college_physics` is itself, of `mmlu`, and three words.

    The squares of the weights sum to 1, so that a task is as alike to itself whatever its name.
    """
    words = sorted({word for word in re.split(r"[\W_]+", name.lower()) if word})
    third = 3**-0.5
    parts = [("=" + name, third), ("/" + name.split("/")[0], third)]
    return parts + [(word, third * len(words) ** -0.5) for word in words]


def _first_roots(prompts: Prompts) -> Float[np.ndarray, "P ME"]:
    return np.sqrt(frequencies(prompts.first)).reshape(len(prompts), math.prod(prompts.first.shape[1:]))


def has_embedding(prompts: Prompts) -> Bool[np.ndarray, " P"]:
    """Which prompts have an embedding. One of zeros only, or of no numbers, is none."""
    return (prompts.embedding != 0).sum(axis=1) > 0


def unit_rows(rows: Float[np.ndarray, "P d"]) -> Float[np.ndarray, "P d"]:
    """Rows scaled to length 1, in float32. A row of zeros stays zero."""
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def radial(left: Float[np.ndarray, "P r"], right: Float[np.ndarray, "others r"]) -> Float[np.ndarray, "P others"]:
    """exp(-|a - b|^2 / 2) of every pair."""
    squares = (left**2).sum(1)[:, None] + (right**2).sum(1)[None] - 2 * left @ right.T
    return np.exp(-np.maximum(squares, 0) / 2)
