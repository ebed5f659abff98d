"""`TokenTable`: how tokens that a prompt holds were routed elsewhere, and what that says of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from emoe_jax.predictor.config import PredictorError
from emoe_jax.traces import RoutingTrace

LENGTHS = 3
"""Of the longest run of tokens that is looked up: a token, after the one before it, after the two before it."""
MAX_TOKEN = (1 << 21) - 2
"""The largest token id that is told apart: three of them fill a 64-bit key. Larger ones are as one."""
MAX_LEARNED = 1 << 19
"""Tokens that are learned from: those of the latest prompts, without prompts that have more. Learning takes some 5 KB
of memory for each."""
_SHRINK = 1.5  # occurrences that the shorter run's routing counts as
_COMPONENTS = 256  # principal directions of routing that are told apart
_BLOCK = 1 << 14  # tokens handled at a time

Tokens = Int[np.ndarray, " tokens"]


class Level(NamedTuple):
    """Runs of one length, by ascending key, and how their routing differs from that of runs one shorter."""

    keys: Int[np.ndarray, " runs"]
    difference: Float[np.ndarray, "runs r"]

    def places(
        self, keys: Int[np.ndarray, " tokens"]
    ) -> tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
        """Where each key is, and whether it is there at all."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return at, self.keys[at] == keys


class TokenTable:
    """The mean routing of the prompt tokens of a trace, by the token and by those before it.

    A run of tokens that occurred rarely is expected to be routed nearly as runs one shorter are. Routing is kept in its
    principal directions. `shares` of a prompt are the mean over its tokens.
    """

    LEVEL = ("keys", "difference", "scale")
    """What `arrays` holds of each length, by name."""

    def __init__(self, mean: Float[np.ndarray, "M E"], basis: Float[np.ndarray, "r ME"], levels: Sequence[Level]):
        self._mean, self._basis, self._levels = mean, basis, tuple(levels)

    @staticmethod
    def learn(
        trace: RoutingTrace, prompts: Int[np.ndarray, " n"], most: int
    ) -> tuple[TokenTable, Float[np.ndarray, "P M E"]]:
        """The table of these `prompts` of a trace that holds its prompts' tokens, and the shares of all its prompts:
        for those learned from, as the others' tokens alone say. Of each length it keeps the runs that occur most often,
        `most` of them at the most. Raises `PredictorError` where every prompt is longer than `MAX_LEARNED`."""
        everything = trace.tokens_by_prompt()
        lengths = np.array([len(ids) for ids in everything])
        learned = np.sort(prompts)[lengths[np.sort(prompts)] <= MAX_LEARNED]
        if not len(learned):
            raise PredictorError(f"every prompt has more than {MAX_LEARNED:,} tokens; expected one that is shorter")
        learned = learned[np.cumsum(lengths[learned][::-1])[::-1] <= MAX_LEARNED]
        table, left_out = TokenTable._learn(trace.select(learned), most)
        others = np.setdiff1d(np.arange(trace.num_prompts), learned)
        said = np.empty((trace.num_prompts, trace.num_layers, trace.num_experts), np.float32)
        said[learned], said[others] = left_out, table.shares([everything[prompt] for prompt in others])
        return table, said

    @staticmethod
    def _learn(trace: RoutingTrace, most: int) -> tuple[TokenTable, Float[np.ndarray, "P M E"]]:
        M, E, k = trace.num_layers, trace.num_experts, trace.top_k
        tokens = trace.tokens_by_prompt()
        lengths = np.array([len(ids) for ids in tokens])
        owner = np.repeat(np.arange(len(tokens)), lengths)
        keys = [np.concatenate([run_keys(ids, n) for ids in tokens]) for n in range(1, LENGTHS + 1)]
        place, experts = _prompt_rows(trace, lengths)
        known = np.zeros(len(owner), bool)
        known[place] = True
        flat = np.zeros((len(owner), M * k), np.int32)
        flat[place] = (experts + E * np.arange(M)[:, None]).reshape(len(place), -1)
        mean = np.bincount(flat[known].ravel(), minlength=M * E) / max(1, k * int(known.sum()))
        basis = _basis(flat, keys[0], known, mean, k)
        routed = np.empty((len(owner), len(basis)), np.float32)  # each token's routing, less the mean
        for start in range(0, len(owner), _BLOCK):
            block = flat[start : start + _BLOCK]
            routed[start : start + _BLOCK] = sum(basis.T[column] for column in block.T) / k
        routed -= (basis @ mean).astype(np.float32)
        routed[~known] = 0
        levels, left_out = [], np.zeros_like(routed)
        below = np.zeros_like(routed)  # what runs one shorter say, with all prompts
        for of_length in keys:
            runs = _Runs.of(of_length, owner, known)
            total, own = runs.sums(routed)
            count, own_count = runs.counts[runs.run], runs.own_counts[runs.pair]
            below_of_run = runs.of_first(below)
            mean_of_run = (total + _SHRINK * below_of_run) / (runs.counts[:, None] + _SHRINK)
            from_others = (total[runs.run] - own[runs.pair] + _SHRINK * left_out) / (
                (count - own_count)[:, None] + _SHRINK
            )
            least = runs.least_count(most)
            left_out = np.where((count - own_count >= least)[:, None], from_others, left_out)
            kept = runs.counts >= least
            difference = np.where(kept[:, None], mean_of_run - below_of_run, 0)
            levels.append(Level(runs.keys[kept], difference[kept].astype(np.float32)))
            below = below + difference[runs.run]
        table = TokenTable(mean.reshape(M, E).astype(np.float32), basis, levels)
        by_prompt = np.zeros((len(tokens), len(basis)), np.float32)
        np.add.at(by_prompt, owner, left_out)
        by_prompt /= np.maximum(lengths, 1)[:, None]
        return table, table._shares(by_prompt)

    def shares(self, tokens: Sequence[Tokens]) -> Float[np.ndarray, "P M E"]:
        """Each prompt's expected shares; the mean of all for one without tokens."""
        coordinates = np.zeros((len(tokens), len(self._basis)), np.float32)
        for row, ids in zip(coordinates, tokens, strict=True):
            for number, level in enumerate(self._levels, start=1):
                at, found = level.places(run_keys(ids, number))
                row += level.difference[at[found]].sum(0) / max(1, len(ids))
        return self._shares(coordinates)

    def coordinates(self, shares: Float[np.ndarray, "P M E"]) -> Float[np.ndarray, "P r"]:
        """Shares less the mean, in the directions in which tokens differ."""
        return (shares - self._mean).reshape(len(shares), -1) @ self._basis.T

    def _shares(self, coordinates: Float[np.ndarray, "P r"]) -> Float[np.ndarray, "P M E"]:
        raw = (coordinates @ self._basis).reshape(-1, *self._mean.shape) + self._mean
        raw = np.maximum(raw, 1e-4)
        return (raw / raw.sum(-1, keepdims=True)).astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """What a file holds of it. Differences are written in steps of 1/127 of the largest of their direction."""
        arrays = {"mean": self._mean, "basis": self._basis.astype(np.float16)}
        for number, level in enumerate(self._levels, start=1):
            scale = np.maximum(np.abs(level.difference).max(0, initial=0), 1e-9).astype(np.float32)
            arrays |= {
                f"keys{number}": level.keys,
                f"difference{number}": np.round(level.difference / scale * 127).astype(np.int8),
                f"scale{number}": scale,
            }
        return arrays

    @staticmethod
    def of_arrays(arrays: dict[str, np.ndarray]) -> TokenTable:
        """Raises `KeyError` or `ValueError` where they are not those of a table."""
        levels = []
        for number in range(1, LENGTHS + 1):
            keys, steps, scale = (arrays[f"{name}{number}"] for name in TokenTable.LEVEL)
            if keys.shape != steps.shape[:1] or steps.shape[1:] != arrays["basis"].shape[:1] or scale.ndim != 1:
                raise ValueError(f"runs of {number} tokens do not belong together")
            levels.append(Level(keys, steps.astype(np.float32) * (scale / 127)))
        return TokenTable(arrays["mean"], arrays["basis"].astype(np.float32), levels)


class _Runs(NamedTuple):
    """Runs of one length in a trace's prompts."""

    keys: Int[np.ndarray, " runs"]
    run: Int[np.ndarray, " tokens"]  # of each token
    counts: Int[np.ndarray, " runs"]  # tokens learned from
    first: Int[np.ndarray, " runs"]  # a token of each run
    pair: Int[np.ndarray, " tokens"]  # run and prompt of each token
    own_counts: Int[np.ndarray, " own_runs"]

    @staticmethod
    def of(
        keys: Int[np.ndarray, " tokens"], owner: Int[np.ndarray, " tokens"], known: Bool[np.ndarray, " tokens"]
    ) -> _Runs:
        unique, first, run = np.unique(keys, return_index=True, return_inverse=True)
        pairs, pair = np.unique(run * (int(owner.max()) + 1) + owner, return_inverse=True)
        own = np.bincount(pair, known, len(pairs)).astype(np.int64)
        return _Runs(unique, run, np.bincount(run, known, len(unique)).astype(np.int64), first, pair, own)

    def sums(
        self, rows: Float[np.ndarray, "tokens r"]
    ) -> tuple[Float[np.ndarray, "runs r"], Float[np.ndarray, "own_runs r"]]:
        """Of each run, and of each run within each prompt."""
        order = np.argsort(self.pair, kind="stable")
        starts = np.searchsorted(self.pair[order], np.arange(len(self.own_counts)))
        own = np.add.reduceat(rows[order], starts, axis=0)
        run_of_pair = self.run[order[starts]]  # ascending
        return np.add.reduceat(own, np.searchsorted(run_of_pair, np.arange(len(self.keys))), axis=0), own

    def of_first(self, rows: Float[np.ndarray, "tokens r"]) -> Float[np.ndarray, "runs r"]:
        return rows[self.first]

    def least_count(self, most: int) -> int:
        """How often a run must have occurred to be one of the `most` frequent ones."""
        ordered = np.sort(self.counts)
        return 1 if len(ordered) <= most else max(1, int(ordered[-most - 1]) + 1)


def run_keys(tokens: Tokens, length: int) -> Int[np.ndarray, " tokens"]:
    """A number for each token and the `length` - 1 before it; before the first comes nothing, which has its own."""
    ids = np.minimum(np.asarray(tokens, np.int64), MAX_TOKEN) + 1
    keys = ids.copy()
    for back in range(1, min(length, len(ids) + 1)):
        keys[back:] += ids[: len(ids) - back] << (21 * back)
    return keys


def _prompt_rows(
    trace: RoutingTrace, lengths: Int[np.ndarray, " P"]
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, "tokens M k"]]:
    """Which of the prompts' tokens, end to end, have their routing recorded, and that routing."""
    rows = np.flatnonzero(trace.token_pos < lengths[trace.sample])
    begins = np.cumsum(lengths) - lengths
    return begins[trace.sample[rows]] + trace.token_pos[rows], trace.experts[rows].astype(np.int32)


def _basis(
    flat: Int[np.ndarray, "tokens Mk"],
    tokens: Int[np.ndarray, " tokens"],
    known: Bool[np.ndarray, " tokens"],
    mean: Float[np.ndarray, " ME"],
    top_k: int,
) -> Float[np.ndarray, "r ME"]:
    """Principal directions in which the mean routing of tokens differs."""
    unique, token = np.unique(tokens[known], return_inverse=True)
    common = np.argsort(np.bincount(token, minlength=len(unique)))[::-1][: 4 * _COMPONENTS * 8]
    place = np.full(len(unique), -1)
    place[common] = np.arange(len(common))
    of_common = place[token] >= 0
    which, chosen = place[token[of_common]], flat[known][of_common]
    totals = np.zeros((len(common), len(mean)), np.float32)
    for column in chosen.T:
        np.add.at(totals, (which, column), 1 / top_k)
    counts = np.bincount(which, minlength=len(common))[:, None]
    weighted = (totals - counts * mean) / np.sqrt(np.maximum(counts, 1))
    values, vectors = np.linalg.eigh(weighted.T @ weighted)
    rank = min(_COMPONENTS, int((values > 1e-6 * max(float(values[-1]), 1e-12)).sum()))
    return np.ascontiguousarray(vectors[:, ::-1][:, :rank].T.astype(np.float32))
