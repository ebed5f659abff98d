"""Where the time of a step goes: a running engine's calls, timed and counted by what they are for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from emoe_jax import Engine

PARTS = ("whole", "layered", "routers", "loads", "commits", "sampling", "results", "policy", "loop")
"""What each of them is: `ACCOUNT`."""

ACCOUNT = """Milliseconds of a step, which add up to it, and how often a part comes in a step:
whole     dispatch of whole forwards
layered   dispatch of layers, one call from router to router
routers   waits for a router's choice
loads     experts that a step waits for: places, reads, transfers
commits   writes of experts to their slots; counted are calls
sampling  choice of tokens, and what a step keeps for log probabilities
results   waits for a forward's report
policy    residency policy, planner, scheduler
loop      all other work of the host"""


class Account:
    """Exclusive times: what a call waits for another that is watched, counts for that one alone."""

    def __init__(self, engine: Engine):
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.calls: Counter[str] = Counter()
        self._inner = [0.0]  # seconds of the watched calls within each open one
        parts, loop = engine.parts, engine.loop
        runner, residency = parts.runner, parts.residency
        self._watch(loop, "run", "loop")
        self._watch(runner, "compute", lambda run: run.way)
        self._watch(runner, "go_on", "layered")
        self._watch(runner.layered, "experts", "routers")
        self._watch(residency.waves, "load", "loads")
        self._watch(residency, "load", "loads")
        self._watch(residency.slab, "commit", "commits")
        self._watch(runner, "finish", "sampling")
        self._watch(loop.dispatcher, "collect", "results")
        self._watch(loop.dispatcher, "wait", "results")
        for owner, name in (
            (residency, "commit"),
            (parts.scheduler, "schedule"),
            (parts.scheduler, "update"),
            (engine.foresight, "before_step"),
            (engine.foresight, "after_step"),
            (engine.foresight, "settle"),
        ):
            self._watch(owner, name, "policy")

    def row(self) -> dict[str, Any]:
        """Milliseconds and calls of each part per step of the loop."""
        steps = max(1, self.calls["loop"])
        found: dict[str, Any] = {"ms_per_step": 1e3 * sum(self.seconds.values()) / steps}
        for part in PARTS:
            found[part] = {"ms": 1e3 * self.seconds[part] / steps, "calls": self.calls[part] / steps}
        return found

    def _watch(self, owner: Any, name: str, part: str | Callable[..., str]) -> None:
        function = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            label = part if isinstance(part, str) else part(*arguments)
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds = time.perf_counter() - began
                self.seconds[label] += seconds - self._inner.pop()
                self._inner[-1] += seconds
                self.calls[label] += 1

        setattr(owner, name, timed)
