"""From outcomes to a row of the table: means over the prompts of a task, and their bootstrap intervals."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from benchmarks.quality.served import Cell, Outcome
from benchmarks.quality.traffic import Item
from train.sensitivity.embedding import Embed
from train.similarity import rouge_l, token_agreement

RESAMPLES = 2000
METRICS = ("exact_match", "similarity", "rouge_l", "perplexity_ratio", "substituted", "substituted_weight")
EMBEDDING = "embedding_similarity"
_MOST_NATS = 700.0  # per token; the exponential of more is no number


@dataclasses.dataclass(frozen=True)
class Row:
    """A task in a cell: the numbers, and what each would have been on resampled prompts."""

    cell: Cell
    task: str
    items: int
    numbers: dict[str, float | None]
    resampled: dict[str, Float[np.ndarray, " resamples"]]

    def as_json(self) -> dict[str, Any]:
        """`ci95` has `[low, high]` of every metric that is not null."""
        intervals = {name: list(interval(values)) for name, values in self.resampled.items()}
        where = {"policy": self.cell.name, "contract": self.cell.contract, "share": self.cell.share}
        return {**where, "task": self.task, "items": self.items, **self.numbers, "ci95": intervals}


def row(
    cell: Cell,
    items: Sequence[Item],
    runs: Sequence[Sequence[Outcome]],
    reference: Sequence[Outcome],
    seed: int,
    embed: Embed | None = None,
) -> Row:
    """The items of one task in a cell. `reference` are the outcomes of the same items with all experts resident.

    An item's numbers are the means over `runs`, each of which has an outcome of every item. The prompts that are drawn
    again depend on `seed` and the task alone, so that cells are compared on equal draws.
    """
    task = items[0].task
    by_run = [_values(items, found, reference, embed) for found in runs]
    values = {name: np.mean([of[name] for of in by_run], axis=0) for name in by_run[0]}
    drawn = resamples(len(items), seed, task)
    lost, tokens = values.pop("lost"), np.array([outcome.tokens for outcome in reference], np.float64)
    numbers: dict[str, float | None] = dict.fromkeys(METRICS)
    numbers |= {name: float(of.mean()) for name, of in values.items()}
    numbers["perplexity_ratio"] = float(perplexity_ratio(lost, tokens))
    resampled = {name: of[drawn].mean(axis=1) for name, of in values.items()}
    resampled["perplexity_ratio"] = perplexity_ratio(lost[drawn], tokens[drawn])
    return Row(cell, task, len(items), numbers, {name: resampled[name] for name in numbers if name in resampled})


def _values(
    items: Sequence[Item], found: Sequence[Outcome], reference: Sequence[Outcome], embed: Embed | None
) -> dict[str, Float[np.ndarray, " examples"]]:
    """By item: every metric, and the nats that were `lost`."""
    values = _answers(items, found, reference, embed) if items[0].answer is not None else {}
    values["substituted"] = np.array([outcome.substituted for outcome in found])
    values["substituted_weight"] = np.array([outcome.substituted_weight for outcome in found])
    values["lost"] = np.array([ours.nats - theirs.nats for ours, theirs in zip(found, reference, strict=True)])
    return values


def _answers(
    items: Sequence[Item], found: Sequence[Outcome], reference: Sequence[Outcome], embed: Embed | None
) -> dict[str, Float[np.ndarray, " examples"]]:
    """By item: whether the answer is the true one, and how alike it is to the reference's."""
    ours = [outcome.answer for outcome in found if outcome.answer is not None]
    theirs = [outcome.answer for outcome in reference if outcome.answer is not None]
    pairs = list(zip(theirs, ours, strict=True))
    values = {
        "exact_match": [float(a.text.strip() == item.answer) for a, item in zip(ours, items, strict=True)],
        "similarity": [token_agreement(full.token_ids, answer.token_ids) for full, answer in pairs],
        "rouge_l": [rouge_l(full.text, answer.text) for full, answer in pairs],
    }
    if embed is not None:
        products = embed([answer.text for answer in ours]) * embed([answer.text for answer in theirs])
        same = [full.token_ids == answer.token_ids for full, answer in pairs]
        values[EMBEDDING] = np.where(same, 1.0, products.sum(axis=1)).tolist()
    return {name: np.array(of, np.float64) for name, of in values.items()}


def perplexity_ratio(
    lost: Float[np.ndarray, "*resamples examples"], tokens: Float[np.ndarray, "*resamples examples"]
) -> Float[np.ndarray, "*resamples"]:
    """Perplexity over that of the reference, by the nats that each item lost and its scored tokens.

    Worked example: 2 tokens that lost ln 2 each and 2 that lost nothing: exp(2 ln 2 / 4), 1.41.
    """
    return np.exp(np.minimum(lost.sum(axis=-1) / tokens.sum(axis=-1), _MOST_NATS))


def resamples(count: int, seed: int, name: str) -> Int[np.ndarray, "resamples examples"]:
    """Bootstrap: `RESAMPLES` times as many of `count` prompts, drawn with replacement."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return rng.integers(count, size=(RESAMPLES, count))


def interval(resampled: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    """The middle 95 % of a number over the resamples."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def mean_over(metric: str, rows: Sequence[Row]) -> tuple[float, float, float]:
    """A metric's mean over tasks with its interval, each task's prompts resampled; of ratios the geometric mean."""
    values: list[Float[np.ndarray, " resamples"]] = [row.resampled[metric] for row in rows]
    means = np.array([row.numbers[metric] for row in rows], np.float64)
    if metric == "perplexity_ratio":
        return (float(np.exp(np.log(means).mean())), *interval(np.exp(np.log(values).mean(axis=0))))
    return (float(means.mean()), *interval(np.mean(values, axis=0)))
