"""What audits found, by contract and task, with intervals."""

import dataclasses
import math
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from itertools import chain
from typing import Any, NamedTuple

from scipy.special import stdtrit

from emoe_jax.residency.accounts import account_of

RECENT = 128
"""Audited answers of a task that its estimates are of."""

CONFIDENCE = 0.95

LEAST = 8
"""Answers that an interval is given for."""

SUPPOSED = 0.01
"""What an answer that no audit met is supposed to lose at least: so many nats, and so much of the agreement. Where all
tasks lose less, or there is one alone, what is common says nothing of answers of another kind."""

MOST_NATS = 100.0
"""What a KL is told up to: no larger one means anything."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Of one answer: means over those of its tokens that were compared."""

    tokens: int
    """Of the whole answer: what the means stand for."""
    kl: float
    """KL(all experts || as served), in nats."""
    agreement: float
    """Share of tokens for which both had the same most probable one."""
    tolerance: float = 0.0
    """Under which it was served."""
    given_up: float = 0.0
    """Share of its router weight that was substituted."""


class Estimate(NamedTuple):
    """A mean per token, from answers of which each has its own mean."""

    mean: float
    error: float
    """Its standard error; infinite for fewer than two answers."""
    answers: int

    @classmethod
    def of(cls, values: Rows[float], tokens: Rows[int]) -> "Estimate":
        """The mean over the tokens of at least one answer. Tokens of one answer are no independent draws, so the error
        is that of a ratio estimate over answers (Cochran, Sampling Techniques, 6.4).
        """
        total, count = sum(tokens), len(values)
        mean = sum(value * weight for value, weight in zip(values, tokens, strict=True)) / total
        if count < 2:
            return cls(mean, math.inf, count)
        squares = sum((weight * (value - mean)) ** 2 for value, weight in zip(values, tokens, strict=True))
        return cls(mean, math.sqrt(squares * count / (count - 1)) / total, count)

    @classmethod
    def of_kl(cls, findings: Iterable[Finding]) -> "Estimate":
        """Mean KL per token, in nats."""
        answers = list(findings)
        return cls.of([each.kl for each in answers], [each.tokens for each in answers])

    @classmethod
    def of_agreement(cls, findings: Iterable[Finding]) -> "Estimate":
        """Mean share of tokens with the same most probable one."""
        answers = list(findings)
        return cls.of([each.agreement for each in answers], [each.tokens for each in answers])

    def interval(self, lossless: float, worst: float) -> tuple[float, float, float] | None:
        """The mean and its 95 % confidence interval, which lies between a mean of no loss and the worst one.

        Few answers lose much, and most little. So the interval reaches by the same factor to both sides of the loss:
        by the same distance, it would lie below what all answers lose too often.

        None for fewer than `LEAST` answers, which may all be of the usual kind.
        """
        if self.answers < LEAST:
            return None
        loss, most = abs(self.mean - lossless), abs(worst - lossless)
        if loss == 0:
            return self.mean, self.mean, self.mean
        quantile = float(stdtrit(self.answers - 1, (1 + CONFIDENCE) / 2))
        factor = math.exp(min(quantile * self.error / loss, MOST_NATS))
        near, far = (math.copysign(end, worst - lossless) for end in (loss / factor, min(most, loss * factor)))
        return self.mean, lossless + min(near, far), lossless + max(near, far)


def interval_of(
    values: Rows[float], tokens: Rows[int], lossless: float, worst: float, common: float
) -> tuple[float, float, float] | None:
    """The mean over answers of one task and its interval, as `Estimate` has them, from what was found of each.

    Where a task loses little, a few of its answers lose most of it, and these may not be among the audited ones. So
    the end of more loss is that with one more answer, which loses what is `common`: the mean over all tasks, or
    `SUPPOSED`. It is an allowance: how often it holds what all answers lose depends on the answers.
    """
    own = Estimate.of(values, tokens).interval(lossless, worst)
    more = Estimate.of([*values, common], [*tokens, math.ceil(sum(tokens) / len(tokens))]).interval(lossless, worst)
    if own is None or more is None:
        return None
    mean, low, high = own
    return (mean, low, max(high, more[2])) if worst > lossless else (mean, min(low, more[1]), high)


class Findings:
    """The newest audits of every contract and task."""

    def __init__(self) -> None:
        self._recent: dict[str, dict[str, deque[Finding]]] = {}
        self._totals: dict[tuple[str, str], int] = {}

    def add(self, contract: str, task: str | None, finding: Finding) -> None:
        """Book the audit of an answer."""
        of_tasks = self._recent.setdefault(contract, {})
        name = account_of(task, of_tasks)
        of_tasks.setdefault(name, deque(maxlen=RECENT)).append(finding)
        self._totals[contract, name] = self._totals.get((contract, name), 0) + 1

    def state(self) -> dict[str, Any]:
        """By contract and task: audits since the start; of the newest under one tolerance, the newest, the tokens they
        stand for and the estimates.

        `perplexity_ratio` is expected on text such as the model writes with all experts: exp of the mean KL.
        """
        state: dict[str, Any] = {}
        for contract, of_tasks in sorted(self._recent.items()):
            every = list(chain(*of_tasks.values()))
            common = max(SUPPOSED, Estimate.of_kl(every).mean)
            common_same = min(1 - SUPPOSED, Estimate.of_agreement(every).mean)
            for task, recent in sorted(of_tasks.items()):
                # A tolerance that is searched for changes, and more answers are audited meanwhile.
                findings = [each for each in recent if each.tolerance == recent[-1].tolerance]
                tokens = [each.tokens for each in findings]
                mean = Estimate.of_kl(findings).mean
                nats = interval_of([each.kl for each in findings], tokens, 0.0, MOST_NATS, common)
                alike = interval_of([each.agreement for each in findings], tokens, 1.0, 0.0, common_same)
                state.setdefault(contract, {})[task] = {
                    "audits": self._totals[contract, task],
                    "tolerance": findings[-1].tolerance if contract == "bounded" else None,
                    "tokens": sum(tokens),
                    "kl": _told(mean, nats),
                    "top1_agreement": _told(Estimate.of_agreement(findings).mean, alike),
                    "perplexity_ratio": _told(math.exp(min(mean, MOST_NATS)), nats and tuple(map(math.exp, nats))),
                }
        return state


def _told(mean: float, interval: tuple[float, ...] | None) -> list[float | None]:
    """Mean, low and high end as JSON-able values; the ends are None where there is no interval."""
    ends = (None, None) if interval is None else interval[1:]
    return [None if value is None else round(value, 6) for value in (mean, *ends)]
