"""`TrafficMix`: what recent answers are expected to have lost, by the audited answers that they resemble."""

import math
from collections import deque
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float16, Int

from emoe_jax.audit.findings import Estimate, Finding

RECENT = 32
"""Answers that stand for the traffic, and audits that count."""

ALIKE = 0.9
"""Overlap of wishes from which on two answers are of one kind. On the demo answers of one kind have 0.95 or more, those
of different kinds mostly less than 0.8, and at most 0.95."""

NEAR = 0.05
"""Audited answers that count for an answer have at most so much less overlap than the most similar one."""


class Wishes(NamedTuple):
    """How often the tokens of a text wished for each expert, in a form that is quick to compare."""

    shares: Float16[np.ndarray, " ME"]
    """By layer and expert, of the layer's wishes. Half precision: one pair of answers need not be exact."""
    repeats: float
    """The probability that two of a layer's wishes are for the same expert, summed over layers."""

    @classmethod
    def of(cls, counts: Int[np.ndarray, "M E"]) -> "Wishes":
        """From counts of which each layer has the same sum, at least 1."""
        total = int(counts[0].sum())
        repeats = float((counts * (counts - 1.0)).sum()) / max(1, total * (total - 1))
        return cls((counts / total).astype(np.float16).reshape(-1), repeats)

    def overlap(self, other: "Wishes") -> float:
        """About 1 for two texts of one kind, however short, and 0 for texts that have no expert in common.

        The index of overlap of Morisita (1959), which the number of wishes does not bias.
        """
        both = self.repeats + other.repeats
        common = float(self.shares.astype(np.float32) @ other.shares.astype(np.float32))
        return min(1.0, 2 * common / both) if both > 0 else float(common > 0)


class _Answer(NamedTuple):
    wishes: Wishes
    tokens: int
    given_up: float
    overlaps: deque[float]
    """With each of the audited answers."""


class TrafficMix:
    """`ended` for every answer, `found` for those that were audited; all under one tolerance.

    Which experts a text wishes for tells kinds of text apart, and costs nothing to know. So few audits tell what each
    kind loses, and the mix of kinds is that of all recent answers.
    """

    def __init__(self) -> None:
        self._answers: deque[_Answer] = deque(maxlen=RECENT)
        self._audited: deque[tuple[Finding, Wishes]] = deque(maxlen=RECENT)
        self._estimate: Estimate | None = None
        self._is_current = True  # whether that is of these answers

    def clear(self) -> None:
        """Forget all answers: what follows is served under another tolerance."""
        self._answers.clear()
        self._audited.clear()
        self._is_current = False

    def ended(self, wishes: Wishes, tokens: int, given_up: float) -> None:
        """An answer of so many tokens ended that gave up this share of its router weight."""
        overlaps = deque((wishes.overlap(audited) for _, audited in self._audited), maxlen=RECENT)
        self._answers.append(_Answer(wishes, tokens, given_up, overlaps))
        self._is_current = False

    def found(self, finding: Finding, wishes: Wishes) -> None:
        """One of the answers was audited."""
        self._audited.append((finding, wishes))
        for answer in self._answers:
            answer.overlaps.append(answer.wishes.overlap(wishes))
        self._is_current = False

    @property
    def unknown(self) -> float:
        """The share of the recent answers' tokens that are of no audited kind; 1 before the first answer."""
        total = sum(answer.tokens for answer in self._answers)
        known = sum(answer.tokens for answer in self._answers if max(answer.overlaps, default=0.0) >= ALIKE)
        return 1 - known / total if total else 1.0

    def estimate(self) -> Estimate | None:
        """Mean KL per token of the recent answers of audited kinds, in nats, and the number of audits behind it.

        Each is expected to lose as many nats for the weight that it gave up as the audited answers most like it. The
        error is that of the jackknife over audits (Efron and Stein 1981). None where no answer is of an audited kind.
        """
        if not self._is_current:
            self._estimate, self._is_current = self._estimated(), True
        return self._estimate

    def _estimated(self) -> Estimate | None:
        if not self._answers or not self._audited:
            return None
        overlaps = np.array([[*answer.overlaps] for answer in self._answers])
        mass = np.array([(answer.tokens, answer.given_up) for answer in self._answers])
        kl, given_up = np.array([(each.kl, each.given_up) for each, _ in self._audited]).T
        kl, given_up = kl * (tokens := np.array([each.tokens for each, _ in self._audited])), given_up * tokens
        every = np.ones(len(kl), bool)
        mean, counts = _means(overlaps, kl, given_up, mass, every[None])
        if not counts.any():
            return None
        without = every & ~np.eye(len(kl), dtype=bool)[counts]
        left = _means(overlaps, kl, given_up, mass, without)[0]
        left = left[np.isfinite(left)]
        error = math.sqrt((len(left) - 1) * float(np.var(left))) if len(left) > 1 else math.inf
        return Estimate(float(mean[0]), error, int(counts.sum()))


def _means(
    overlaps: Float[np.ndarray, "answers audits"],
    kl: Float[np.ndarray, " audits"],
    given_up: Float[np.ndarray, " audits"],
    mass: Float[np.ndarray, "answers 2"],
    kept: Bool[np.ndarray, "n audits"],
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " audits"]]:
    """By each choice of audits, the mean over answers of a kind that these know (not a number if there is none); and
    which audits count for any.

    `mass` are each answer's tokens and the share of weight that it gave up.
    """
    seen = np.where(kept[:, None], overlaps, -math.inf)
    alike = (seen >= ALIKE) & (seen >= seen.max(axis=-1, keepdims=True) - NEAR)
    lost, gave = alike @ kl, alike @ given_up
    tokens, own = mass.T
    rates = np.divide(lost, gave, out=np.zeros_like(lost), where=gave > 0)
    known = alike.any(axis=-1) @ tokens
    means = np.divide(rates @ (tokens * own), known, out=np.full(len(kept), math.nan), where=known > 0)
    return means, alike.any(axis=(0, 1))
