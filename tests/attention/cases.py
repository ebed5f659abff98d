"""Views over random pages, with what each row sees and softmax attention by its definition in NumPy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emoe_jax.attention import KVView, LayerKV, attend
from emoe_jax.scheduling.pages import PAGE_SIZE

OP = jax.jit(attend, static_argnames=("window", "scale", "backend", "platform"))


@dataclasses.dataclass(frozen=True)
class Shape:
    """`lengths` rows of each group from position `starts` on. Groups with the same number in `sequences` share pages.

    The first `common` pages are shared by all sequences.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    T: int = 1
    width: int = 12
    window: int | None = None
    heads: tuple[int, int, int] = (4, 2, 8)
    dtype: str = "float32"
    sinks: bool = False
    shared: int | None = None
    """The first so many numbers of a key are its value."""
    sequences: tuple[int, ...] | None = None
    common: int = 0

    def case(self, seed: int = 0) -> "Case":
        """Random queries, pages in random order, and block tables over them."""
        rng = np.random.default_rng(seed)
        (N, K, H), B = self.heads, len(self.starts)
        sequences = self.sequences or tuple(range(B))
        pages = 1 + (max(sequences) + 1) * self.width
        own = 1 + rng.permutation(pages - 1).reshape(-1, self.width)
        own[:, : self.common] = own[0, : self.common]
        ends = [start + length if length else 0 for start, length in zip(self.starts, self.lengths, strict=True)]
        used = np.zeros(len(own), int)
        for sequence, end in zip(sequences, ends, strict=True):
            used[sequence] = max(used[sequence], -(-end // PAGE_SIZE))
        own = np.where(np.arange(self.width) < used[:, None], own, 0)
        positions = np.asarray(self.starts)[:, None] + np.arange(self.T)
        valid = np.arange(self.T) < np.asarray(self.lengths)[:, None]

        def random(*shape: int) -> np.ndarray:
            return np.asarray(jnp.asarray(rng.standard_normal(shape), self.dtype))

        q = random(B, self.T, N, H)
        k, v = random(pages, K, PAGE_SIZE, H), random(pages, K, PAGE_SIZE, H)
        v = v if self.shared is None else None
        sinks = rng.standard_normal(N).astype(np.float32) if self.sinks else None
        return Case(self, q, k, v, positions.astype(np.int32), valid, own[list(sequences)].astype(np.int32), sinks)


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `attend`. `k` and `v` are pages `[pages, K, page, H]`; without `v`, keys hold the values."""

    shape: Shape
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray | None
    positions: np.ndarray
    valid: np.ndarray
    tables: np.ndarray
    sinks: np.ndarray | None

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arrays, and what else `attend` gets."""
        v = None if self.v is None else jnp.asarray(self.v)
        cache = LayerKV(jnp.asarray(self.k), v, self.shape.shared)
        view = KVView(*(jnp.asarray(x) for x in (self.positions, self.valid, self.tables)))
        sinks = None if self.sinks is None else jnp.asarray(self.sinks)
        rule = {"window": self.shape.window, "scale": self.shape.heads[2] ** -0.5, "sinks": sinks}
        return (jnp.asarray(self.q), cache, view), rule

    def run(self, backend: str) -> np.ndarray:
        """The attended rows `[B, T, N, Hv]`."""
        arrays, rule = self.arguments()
        return np.asarray(OP(*arrays, **rule, backend=backend))

    def seen(self, b: int, t: int) -> tuple[np.ndarray, np.ndarray]:
        """The pages and the places in them of what a row sees, oldest first."""
        if not self.valid[b, t]:
            return np.zeros(0, int), np.zeros(0, int)
        last, window = self.positions[b, t], self.shape.window
        at = np.arange(0 if window is None else max(0, last - window + 1), last + 1)
        return self.tables[b, at // PAGE_SIZE], at % PAGE_SIZE

    @property
    def pages(self) -> dict[str, np.ndarray]:
        """`k` and, where values are kept beside keys, `v`."""
        return {"k": self.k} if self.v is None else {"k": self.k, "v": self.v}

    def seen_places(self) -> np.ndarray:
        """By place of every page, whether a row sees it: `[pages, page]`."""
        places = np.zeros((self.k.shape[0], PAGE_SIZE), bool)
        for b, t in np.ndindex(*self.valid.shape):
            places[self.seen(b, t)] = True
        return places

    def rows_that_see(self, page: int, offset: int) -> np.ndarray:
        """By row whether it sees this place: `[B, T]`."""
        found = np.zeros(self.valid.shape, bool)
        for b, t in np.ndindex(*self.valid.shape):
            pages, offsets = self.seen(b, t)
            found[b, t] = np.any((pages == page) & (offsets == offset))
        return found

    def by_definition(self) -> np.ndarray:
        """Softmax attention row by row and head by head in float64; zeros for padding."""
        N, K, H = self.shape.heads
        values = self.k[..., : self.shape.shared] if self.v is None else self.v
        q, k, v = (x.astype(np.float64) for x in (self.q, self.k, values))
        out = np.zeros((*q.shape[:3], v.shape[3]))
        for b, t, n in np.ndindex(*self.q.shape[:3]):
            pages, offsets = self.seen(b, t)
            if not len(pages):
                continue
            head = n // (N // K)
            scores = k[pages, head, offsets] @ q[b, t, n] * H**-0.5
            if self.sinks is not None:
                scores = np.append(scores, self.sinks[n])
            powers = np.exp(scores - scores.max())
            out[b, t, n] = (powers / powers.sum())[: len(pages)] @ v[pages, head, offsets]
        return out
