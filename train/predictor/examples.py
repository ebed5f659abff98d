"""A trace made into training examples: who is held out, what the network sees, what it should say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from emoe_jax.errors import EmoeError
from emoe_jax.predictor import Predictor, PredictorConfig, Prompts
from emoe_jax.predictor.inputs import History
from emoe_jax.predictor.layers import LayerPrior
from emoe_jax.predictor.model import Inputs, Known
from emoe_jax.predictor.predictor import MAX_MEMORY
from emoe_jax.predictor.prompts import frequencies
from emoe_jax.predictor.token_prior import TokenPrior
from emoe_jax.predictor.tokens import TokenTable
from emoe_jax.traces import RoutingTrace
from train.predictor.objective import Batch

MIN_PROMPTS = 8

Shares = Float[np.ndarray, "P M E"]


class Opinions(NamedTuple):
    """What closed forms say of prompts that they have not seen: the prior, corrected by the prompts' tokens where these
    are read."""

    plain: Shares  # before any answer token
    early: Shares  # with the first answer tokens
    given: Shares  # given the routing of each layer's earlier layers


class DataError(EmoeError):
    """A trace that holds too little to train or judge on."""


@dataclasses.dataclass(frozen=True)
class HeldOutSplit:
    """Prompt numbers, ascending: to train on, and to choose the best checkpoint by."""

    train: Int[np.ndarray, " train"]
    held_out: Int[np.ndarray, " held_out"]

    @staticmethod
    def draw(prompts: Prompts, share: float, seed: int) -> HeldOutSplit:
        """A random `share` of the prompts that have any routing is held out."""
        routed = np.flatnonzero(prompts.counts.sum((1, 2)) > 0)
        if len(routed) < MIN_PROMPTS:
            raise DataError(f"the trace has {len(routed)} prompts with routing; {MIN_PROMPTS} are needed to train")
        mixed = np.random.default_rng(seed).permutation(routed)
        held_out = max(2, round(share * len(routed)))
        return HeldOutSplit(np.sort(mixed[held_out:]), np.sort(mixed[:held_out]))


class Examples:
    """Prompts as arrays in memory, three times: before any answer token, with the first ones, given earlier layers."""

    def __init__(self, predictor: Predictor, prompts: Prompts, histories: list[History], priors: Opinions):
        build = predictor.inputs.build
        self.inputs = tuple(
            build(prompts, prior, histories, with_first)
            for prior, with_first in zip(priors, (False, True, False), strict=True)
        )
        self.follows_layers = predictor.config.variant == "layer-by-layer"
        self.priors, self.counts = priors, prompts.counts
        self.shares = frequencies(prompts.counts)
        self.routing = predictor.inputs.routing(self.shares)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def _ways(self) -> Iterator[tuple[Any, ...]]:
        return zip(*self.inputs, strict=True)

    def batch(self, rng: np.random.Generator, rows: int, smoothing: float, weight_power: float) -> Batch:
        """`rows` prompts, each with or without its first tokens or given earlier layers, with or without the prompts
        before it; what else may be seen of true routing is drawn later.

        The target is the prompt's frequencies, drawn towards the prior by `smoothing` assignments, so that a
        short prompt's noise is not learned.
        """
        chosen = rng.permutation(len(self))[:rows] if rows <= len(self) else rng.integers(len(self), size=rows)
        kind = rng.choice(3, size=len(chosen), p=(0.25, 0.25, 0.5) if self.follows_layers else (0.5, 0.5, 0))
        mixed: Any = (np.choose(_beside(kind, ways[0]), [way[chosen] for way in ways]) for ways in self._ways)
        inputs = Inputs(*mixed)
        inputs.layers[rng.random(len(chosen)) < 0.5, :, 1:3] = 0  # pyright: ignore[reportIndexIssue]
        counts = self.counts[chosen]
        total = counts.sum(-1, keepdims=True)
        target = (counts + smoothing * np.exp(inputs.prior)) / (total + smoothing)
        layers = counts.shape[1]
        known = Known(self.routing[chosen], np.zeros((len(chosen), layers, layers), bool))  # pyright: ignore[reportArgumentType]
        weight: Float[np.ndarray, " B"] = counts.sum((1, 2)).astype(np.float32) ** weight_power
        return Batch(inputs, known, target.astype(np.float32), weight, kind == 2)  # pyright: ignore[reportArgumentType]


def _beside(kind: Int[np.ndarray, " B"], array: Any) -> Int[np.ndarray, "B ..."]:
    return kind.reshape(-1, *[1] * (np.ndim(array) - 1))


def closed_forms(
    prompts: Prompts, rows: Int[np.ndarray, " n"], config: PredictorConfig, trace: RoutingTrace | None = None
) -> tuple[Predictor, Opinions]:
    """A predictor without networks that learned from the prompts `rows`, and what it says of each of these as learned
    from all others: what it will be like for a new prompt.

    It remembers the latest of them. Its kernel and scales are those of the latest of all prompts (they look at names,
    embeddings and mean routing). With the `trace` of the prompts it learns to read their tokens, if the trace holds
    them.
    """
    old, remembered = rows[:-MAX_MEMORY], rows[-MAX_MEMORY:]
    predictor = Predictor(config, prompts.latest(MAX_MEMORY), remembered=prompts.take(remembered))
    counts = prompts.counts[rows]
    of_priors = [np.concatenate([prior.predict(prompts.take(old)), prior.left_out()]) for prior in predictor.priors]
    if trace is not None and trace.prompt_tokens is not None:
        table, said = TokenTable.learn(trace, rows, config.token_runs)
        predictor.tokens, of_priors = TokenPrior.fit(table, said[rows], of_priors, counts)
    predictor.layers, given = LayerPrior.fit(of_priors[0], counts, config.top_k)
    return predictor, Opinions(of_priors[0], of_priors[1], given)


def prepare(
    prompts: Prompts, split: HeldOutSplit, config: PredictorConfig, trace: RoutingTrace | None = None
) -> tuple[Predictor, Examples, Examples]:
    """A predictor that learned from the training prompts, and the examples of both parts of the split.

    Its networks will fit a predictor of `closed_forms` that learned from all prompts.
    """
    histories = History.of(prompts.counts)
    predictor, of_train = closed_forms(prompts, split.train, config, trace)
    unseen = prompts.take(split.held_out)
    plain, early = (
        predictor.by_tokens(unseen, predictor.prior(first).predict(unseen), first) for first in (False, True)
    )
    assert predictor.layers is not None
    of_unseen = Opinions(plain, early, predictor.layers.predict(plain, frequencies(unseen.counts)))

    def examples(rows: Int[np.ndarray, " n"], opinions: Opinions) -> Examples:
        return Examples(predictor, prompts.take(rows), [histories[row] for row in rows], opinions)

    return predictor, examples(split.train, of_train), examples(split.held_out, of_unseen)
