"""`QualityTarget`: the largest tolerance under which answers keep a promise, found by audits for each task."""

import math
from typing import Any

from emoe_jax.audit.findings import Finding
from emoe_jax.audit.mix import TrafficMix, Wishes
from emoe_jax.requests.contract import USUAL_TOLERANCE, QualityTargets
from emoe_jax.residency.accounts import account_of

STEPS = range(-8, 13)
"""Rungs of the ladder around the usual tolerance, each `2 ** (1 / 4)` of the one below it. Below them is 0: `exact`."""

ENOUGH = 6
"""Audits of a rung before it is left for a higher one, or stayed on."""

DOUBTS = ((2 * ENOUGH, 1), (ENOUGH, 0), (3, -1))
"""From so many audits on, so many standard errors of them are held against a rung."""

GROWTH = 2 ** (3 / 4)
"""What a rung loses, expected as a multiple of the one below: with the third power of the tolerance."""

LONGEST_RISE, LONGEST_FALL = 2, 4
"""Rungs that are passed at once: what a rise to the wrong one costs is paid by answers."""

UNKNOWN = 0.25
"""Of the recent answers' tokens: while more are of no audited kind, half of the answers are audited."""

FORGOTTEN_AFTER = 256
"""Requests of a task after which a rung that lost too much may be tried again: traffic changes."""


def ladder(top_k: int) -> tuple[float, ...]:
    """The tolerances that are tried, ascending from 0."""
    usual = USUAL_TOLERANCE / top_k
    rungs = sorted({min(1.0, usual * 2 ** (step / 4)) for step in STEPS})
    return (0.0, *(float(f"{rung:.3g}") for rung in rungs))


class ToleranceSearch:
    """The rung of one task: up while audits stay below the target, down once they do not.

    It goes down as soon as the target lies below the mean by its standard error, then below the mean itself, and by the
    most audits (`DOUBTS`) below the mean and its standard error. It goes up where a higher rung is expected to stay
    below the target. A rung that lost too much is not tried again for a while. On the lowest rung nothing is
    substituted, which always keeps the target. Audits count as recent answers resemble them (`TrafficMix`), so it goes
    down when traffic changes to a kind that loses more, and unknown kinds are audited first.
    """

    def __init__(self, target: float, rungs: tuple[float, ...], start: int):
        """`target`: the ratio of perplexities less 1. `start`: the rung of the first requests."""
        self._target = math.log1p(target)
        self._rungs, self._rung = rungs, start
        self._mix = TrafficMix()  # of this rung
        self._requests = 0
        self._lossy: dict[int, int] = {}  # rungs that lost too much, and the requests that had come by then

    @property
    def tolerance(self) -> float:
        """Under which the next request of the task is served, if it names none."""
        return self._rungs[self._rung]

    @property
    def settled(self) -> bool:
        """Whether this rung keeps the target by enough audits, and the next is known or expected to lose too much."""
        if self._rung == 0:
            return True
        kl = self._mix.estimate()
        if kl is None or kl.answers < ENOUGH or self._mix.unknown > UNKNOWN:
            return False
        return kl.mean + kl.error <= self._target and not self._moves()

    def arrived(self) -> None:
        """A request of the task came."""
        self._requests += 1
        self._lossy = {rung: since for rung, since in self._lossy.items() if self._requests - since < FORGOTTEN_AFTER}
        if self._rung == 0 and 1 not in self._lossy:
            self._move(1)

    def ended(self, tolerance: float, wishes: Wishes, tokens: int, given_up: float) -> None:
        """An answer of so many tokens ended that was served under this tolerance and gave up this share of its router
        weight. One that was served under another tolerance, before it was changed, does not count.
        """
        if self._is_present(tolerance):
            self._mix.ended(wishes, tokens, given_up)
            self._follow()

    def found(self, finding: Finding, wishes: Wishes) -> None:
        """An answer was audited."""
        if self._is_present(finding.tolerance):
            self._mix.found(finding, wishes)
            self._follow()

    def _follow(self) -> None:
        move = self._moves()
        if move < 0:
            self._lossy[self._rung] = self._requests
        if move:
            self._move(self._rung + move)

    def _is_present(self, tolerance: float) -> bool:
        return self._rung > 0 and math.isclose(tolerance, self.tolerance)

    def _moves(self) -> int:
        """The rungs to go up, or down where that is negative."""
        estimate = self._mix.estimate()
        if estimate is None:
            return 0
        mean, error, count = estimate
        # The more audits there are, the more they have to say for the rung.
        doubt = next((error * sign for least, sign in DOUBTS if count >= least), None)
        if doubt is not None and mean + doubt > self._target:
            down = math.ceil(math.log(mean / self._target, GROWTH))
            return -min(max(1, down), LONGEST_FALL, self._rung)
        if count < ENOUGH or self._mix.unknown > UNKNOWN:
            return 0
        above = min([len(self._rungs), *(rung for rung in self._lossy if rung > self._rung)])
        room = self._target / max(mean + error, self._target / GROWTH**LONGEST_RISE)
        return max(0, min(int(math.log(room, GROWTH)), above - 1 - self._rung)) if room >= 1 else 0

    def _move(self, rung: int) -> None:
        self._rung = rung
        self._mix.clear()


class QualityTarget:
    """The tolerances of all tasks, each with a target of its own or the common one."""

    def __init__(self, targets: QualityTargets, top_k: int):
        self._targets = targets
        self._rungs = ladder(top_k)
        self._start = self._rungs.index(float(f"{USUAL_TOLERANCE / top_k:.3g}"))
        self._tasks: dict[str, ToleranceSearch] = {}

    def search(self, task: str | None) -> ToleranceSearch:
        """That of a task, begun when it is first asked for."""
        name = account_of(task, self._tasks)
        if name not in self._tasks:
            target = self._targets.of_tasks.get(name, self._targets.usual)
            self._tasks[name] = ToleranceSearch(target, self._rungs, self._start)
        return self._tasks[name]

    def state(self) -> dict[str, Any]:
        """The target, and by task the tolerance and whether it is the one to stay at."""
        tasks = {
            task: {"tolerance": search.tolerance, "settled": search.settled}
            for task, search in sorted(self._tasks.items())
        }
        return {"usual": self._targets.usual, "of_tasks": dict(self._targets.of_tasks), "tasks": tasks}
