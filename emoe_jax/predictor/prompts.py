"""Prompts as the predictor sees them: task, embedding, routing. Also what it remembers, in one file."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Real

from emoe_jax.predictor.config import PredictorError
from emoe_jax.traces import RoutingTrace


@dataclasses.dataclass(frozen=True)
class Prompts:
    """`P` prompts in arrival order. `first` counts the first few answer tokens, `counts` all: also the prompt's own
    where the trace holds them.
    """

    tasks: tuple[str, ...]
    embedding: Float[np.ndarray, "P d"]  # a row of zeros where there is none; d is 0 where no prompt can have one
    counts: Int[np.ndarray, "P M E"]
    first: Int[np.ndarray, "P M E"]
    tokens: tuple[Int[np.ndarray, " tokens"], ...] | None = None  # ids of the prompts' tokens, where these are known

    def __len__(self) -> int:
        return len(self.tasks)

    @staticmethod
    def of(trace: RoutingTrace, first_tokens: int, embedding_dim: int = 0) -> Prompts:
        """`embedding_dim` is for a trace without embeddings; those of a trace that has them are taken as they are."""
        embedding = trace.prompt_embedding
        if embedding is None:
            embedding = np.zeros((trace.num_prompts, embedding_dim), np.float32)
        tokens = None if trace.prompt_tokens is None else tuple(trace.tokens_by_prompt())
        counts, first = trace.counts(), trace.counts(first=first_tokens)
        return Prompts(tuple(trace.tasks), embedding.astype(np.float32), counts, first, tokens)

    def take(self, rows: Sequence[int] | Int[np.ndarray, " n"]) -> Prompts:
        """The prompts of these rows, in this order; a row may come twice. Arrays are copied."""
        rows = np.asarray(rows, np.int64)
        tasks = tuple(self.tasks[row] for row in rows)
        tokens = None if self.tokens is None else tuple(self.tokens[row] for row in rows)
        return Prompts(tasks, self.embedding[rows], self.counts[rows], self.first[rows], tokens)

    def join(self, later: Prompts) -> Prompts:
        """These prompts, then the `later` ones. Token ids are kept only where both have them."""
        embedding, counts, first = (
            np.concatenate([getattr(self, name), getattr(later, name)]) for name in ("embedding", "counts", "first")
        )
        tokens = None if self.tokens is None or later.tokens is None else self.tokens + later.tokens
        return Prompts(self.tasks + later.tasks, embedding, counts, first, tokens)

    def latest(self, number: int) -> Prompts:
        """The last of them, at most so many."""
        return self if len(self) <= number else self.take(range(len(self) - number, len(self)))

    def shuffled(self, seed: int) -> Prompts:
        """The same prompts with their routing dealt to others: a control from which nothing can be learned.
        Their tokens are left out: what these say is learned token by token."""
        order = shuffled_order(len(self), seed)
        return dataclasses.replace(self, counts=self.counts[order], first=self.first[order], tokens=None)

    def routed(self) -> Prompts:
        """Without prompts whose routing is unknown, of which nothing can be learned."""
        return self.take(np.flatnonzero(self.counts.sum((1, 2)) > 0))

    def save(self, path: Path) -> None:
        """Without tokens: nothing is learned from those once a predictor is made."""
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                tasks=np.array(self.tasks, dtype=np.str_),
                embedding=self.embedding,
                counts=self.counts.astype(np.int32),
                first=self.first.astype(np.int32),
            )

    @staticmethod
    def load(path: Path) -> Prompts:
        """Raises `PredictorError` where the file is missing, damaged or not one of these."""
        try:
            with path.open("rb") as file:  # NumPy leaves a damaged file open when it is given a path
                archive = np.load(file, allow_pickle=False)
                arrays = {name: archive[name] for name in ("tasks", "embedding", "counts", "first")}
        except FileNotFoundError:
            raise PredictorError(f"{path.parent} holds no whole predictor ({path.name} is missing)") from None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise PredictorError(f"{path} is damaged: {' '.join(str(error).split())}") from None
        tasks, embedding, counts, first = (arrays[name] for name in ("tasks", "embedding", "counts", "first"))
        consistent = tasks.ndim == 1 and embedding.ndim == 2 and counts.ndim == 3 and first.shape == counts.shape
        if not consistent or not len(tasks) == len(embedding) == len(counts) or len(tasks) == 0:
            raise PredictorError(f"{path} is damaged: its arrays do not belong together")
        if embedding.dtype != np.float32 or counts.dtype != np.int32 or first.dtype != np.int32:
            raise PredictorError(f"{path} is damaged: its arrays are of the wrong types")
        return Prompts(tuple(str(task) for task in tasks), embedding, counts, first)


def shuffled_order(number: int, seed: int) -> Int[np.ndarray, " P"]:
    """Whose routing each prompt gets when routing is dealt to others."""
    return np.random.default_rng(seed).permutation(number)


def frequencies(counts: Real[np.ndarray, "... E"]) -> Float[np.ndarray, "... E"]:
    """Counts as shares of their layer's assignments; uniform where a layer has none."""
    total = counts.sum(-1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), 1 / counts.shape[-1]).astype(np.float32)
