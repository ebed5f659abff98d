"""Slab and KV cache trade places under load: when they should, and how they do it within the memory plan."""

import logging
import time
from collections.abc import Callable
from typing import Any

from emoe_jax.device.runner import Runner
from emoe_jax.errors import ConfigError
from emoe_jax.memory.plan import MemoryPlan
from emoe_jax.memory.splits import MemorySplit, changes
from emoe_jax.progress import Progress
from emoe_jax.residency.residency import Residency
from emoe_jax.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

DWELL_SECONDS = 15.0
"""The least time from one trade to the next, and how long few pages must have been in use before slots come back."""

SHORT_SHARE = 0.5
"""Share of recent steps that lack pages from which on slots become pages."""

RECENT_STEPS = 16

CALM_USAGE = 0.5
"""Share of the planned pages in use up to which the others are not missed."""

REFILL_SECONDS = 30.0
"""How long `warm_up` waits for experts that it had to displace."""


class Pressure:
    """Whether the KV cache lacks pages, or could do without some, from what is seen before each step."""

    def __init__(self, now: float, planned_pages: int):
        self._planned_pages = planned_pages
        self._short = 0.0  # share of recent steps that lacked pages
        self._since = self._calm_since = now

    def look(self, now: float, *, short: bool, used: int) -> None:
        """`short`: whether the step before lacked pages; `used` of them are in use."""
        self._short += (short - self._short) / RECENT_STEPS
        if short or used > CALM_USAGE * self._planned_pages:
            self._calm_since = now

    def wants_pages(self, now: float) -> bool:
        """Whether enough recent steps lacked pages, and the last trade is `DWELL_SECONDS` ago. `now` is in seconds."""
        return self._short >= SHORT_SHARE and now - self._since >= DWELL_SECONDS

    def spares_pages(self, now: float) -> bool:
        """Whether no step lacked pages and few were in use for `DWELL_SECONDS`. `now` is in seconds."""
        return now - max(self._since, self._calm_since) >= DWELL_SECONDS

    def traded(self, now: float) -> None:
        """Forget what was seen before the trade at time `now`, in seconds."""
        self._short, self._since, self._calm_since = 0.0, now, now


class MemoryTrade:
    """Which split of the memory plan is in force. Owned by the owner of the step.

    Before a step, `look` says whether a trade is due; `trade` then makes it once no step is in flight. Nothing becomes
    due by itself before `warm_up` has compiled for both splits.
    """

    def __init__(
        self,
        memory: MemoryPlan,
        residency: Residency,
        scheduler: Scheduler,
        runner: Runner,
        slots_changed: Callable[[], None],
    ):
        """`slots_changed` is called after every trade."""
        self.split = memory.planned
        self._memory = memory
        self._residency, self._scheduler, self._runner = residency, scheduler, runner
        self._slots_changed = slots_changed
        self._pressure: Pressure | None = None  # None while nothing may become due
        self._due: MemorySplit | None = None
        self._short_steps = 0
        self._count = 0
        self._seconds = 0.0
        self._error: str | None = None

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compile all step shapes for the planned split and for the lean one, if there is one.

        From then on a trade may become due. Experts that had to make room meanwhile are waited for.
        """
        planned, lean = self._memory.planned, self._memory.lean
        splits = [planned] if lean is None else [planned, lean]
        for number, split in enumerate(splits):

            def report(done: int, total: int, number: int = number) -> None:
                if progress is not None:
                    progress(number * total + done, len(splits) * total)

            self.trade(split)
            if number:
                self._residency.slab.compile_commits()
            self._runner.warm_up(report)
        if lean is None:
            return
        self.trade(planned)
        self._residency.settle(REFILL_SECONDS)
        self._count, self._seconds = 0, 0.0
        if self._error is None:
            self._pressure = Pressure(time.monotonic(), planned.num_pages)

    def look(self) -> MemorySplit | None:
        """The split that should replace the present one as soon as no step is in flight, or None."""
        pressure, lean = self._pressure, self._memory.lean
        if pressure is not None and lean is not None:
            now, short = time.monotonic(), self._scheduler.num_short_steps
            pressure.look(now, short=short > self._short_steps, used=self._scheduler.pool.num_used)
            self._short_steps = short
            if self._due is None and self.split != lean and pressure.wants_pages(now):
                self._due = lean
            elif self._due is None and self.split == lean and pressure.spares_pages(now):
                self._due = self._memory.planned
        fits = self._due is not None and self._scheduler.pool.num_used < self._due.num_pages
        return self._due if fits else None

    def ask(self, lean: bool) -> None:
        """Have this split be due next. Raises `ConfigError` where there is no lean one."""
        if self._memory.lean is None:
            raise ConfigError("the memory plan has one split of slab and KV cache: nothing can be traded")
        self._due = self._memory.lean if lean else self._memory.planned

    def trade(self, target: MemorySplit) -> None:
        """Go over to another split now; no step may be in flight. A no-op for the present one.

        Experts that stay are copied from device to device, as are pages in use and, where they fit, pages kept for
        their prefix. Where memory cannot be had after all, what was changed so far stays, which is within the plan,
        the error is in the state, and nothing is traded any more.
        """
        self._due = None
        if target == self.split:
            return
        began = time.monotonic()
        try:
            self._change(target)
        except Exception as error:
            self._error, self._pressure = f"{type(error).__name__}: {error}"[:500], None
            log.exception("slab and KV cache keep what they have from now on")
        else:
            self._count += 1
        finally:
            self.split = MemorySplit(self._residency.slab.capacities, self._scheduler.pool.num_pages)
            self._runner.memory_changed()
            self._slots_changed()
            self._residency.refill()
            self._seconds += time.monotonic() - began
        if self._pressure is not None:
            self._pressure.traded(time.monotonic())

    def state(self) -> dict[str, Any]:
        """As JSON-able values."""
        lean = self._memory.lean
        return {
            "possible": lean is not None,
            "lean": lean is not None and self.split == lean,
            "trades": self._count,
            "trade_seconds": round(self._seconds, 6),
            "error": self._error,
        }

    def _change(self, target: MemorySplit) -> None:
        if target.num_pages < self.split.num_pages:
            self._runner.move_pages(self._scheduler.resize_pool(target.num_pages))
        for what, layer, _, size in changes(self.split, target, self._runner.config.num_layers):
            if what == "slots":
                self._residency.resize(layer, size)
            else:
                self._runner.resize_pages(layer, size)
        if target.num_pages > self.split.num_pages:
            self._scheduler.resize_pool(target.num_pages)
