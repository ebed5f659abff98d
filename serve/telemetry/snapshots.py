"""The engine's state and all metrics as of a moment ago: computed a few times a second, shared by all callers."""

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import pydantic_core

from serve.refusals import Unavailable
from serve.served_engine import ServedEngine
from serve.telemetry.engine_metrics import engine_families
from serve.telemetry.metrics import RequestMetrics, exposition
from serve.telemetry.process_metrics import process_metrics
from serve.worker import EngineWorker

REFRESH_SECONDS = 0.25
"""The greatest age of what a caller gets, a step's duration aside."""
LEAST_PAUSE = 0.02
"""Seconds between two looks at the engine when requests come and go in between."""
PAUSE_FACTOR = 50
"""A look is followed by a pause of so many times its cost, up to `REFRESH_SECONDS`: looks take 2 % of the time."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The findings of one look at the engine, and the bytes that callers get of them, each made once."""

    state: dict[str, Any] | None
    """None when the engine's thread has ended."""
    changes: int
    """Of the server, counted before the look."""
    taken: float
    """Seconds on the monotonic clock."""
    model_name: str
    metrics: RequestMetrics

    @functools.cached_property
    def state_json(self) -> bytes:
        """Raises `Unavailable` when the engine's thread has ended."""
        if self.state is None:
            raise Unavailable("the engine has stopped")
        return pydantic_core.to_json(self.state, inf_nan_mode="null")

    @functools.cached_property
    def metrics_text(self) -> bytes:
        """In Prometheus' text format. Without the engine's part when its thread has ended."""
        families = [
            *self.metrics.families(self.model_name),
            *engine_families(self.state or {}, self.model_name),
            *process_metrics().families(self.model_name),
        ]
        return exposition(families)


class Snapshots:
    """Looks at the engine between two of its steps, only when a caller asks, and seldom however many ask.

    What a caller gets is at most `REFRESH_SECONDS` old, and never older than the last change that clients know of: a
    request that came or ended, a compilation. Where the last look is older than that, but too recent to look again,
    the caller waits for the next one. Lives on the event loop.
    """

    def __init__(self, worker: EngineWorker, metrics: RequestMetrics, model_name: str):
        self._worker = worker
        self._metrics = metrics
        self._model_name = model_name
        self._latest: Snapshot | None = None
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = -REFRESH_SECONDS
        self._cost = 0.0
        """Seconds that the last look took, what was written of it included."""
        process_metrics()  # counts compilations from now on

    async def state_json(self) -> bytes:
        """The engine's state as JSON. Raises `Unavailable` when the engine's thread has ended."""
        return self._written(await self._current(), lambda snapshot: snapshot.state_json)

    async def metrics_text(self) -> bytes:
        """All metrics in Prometheus' text format; without the engine's own when its thread has ended."""
        return self._written(await self._current(), lambda snapshot: snapshot.metrics_text)

    def _written(self, snapshot: Snapshot, write: Callable[[Snapshot], bytes]) -> bytes:
        began = time.perf_counter()
        try:
            return write(snapshot)
        finally:
            self._cost += time.perf_counter() - began  # next to nothing when it was written before

    async def _current(self) -> Snapshot:
        asked, changes = time.monotonic(), self._changes()
        while True:
            latest = self._latest
            if latest is not None:
                is_recent = asked - latest.taken <= REFRESH_SECONDS and latest.changes >= changes
                if is_recent or latest.taken >= asked:
                    return latest
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look())
            await asyncio.shield(self._looking)  # a caller that leaves does not end it for the others

    async def _look(self) -> None:
        pause = min(max(PAUSE_FACTOR * self._cost, LEAST_PAUSE), REFRESH_SECONDS)
        await asyncio.sleep(self._looked_at + pause - time.monotonic())
        changes, self._cost = self._changes(), 0.0
        try:
            state, self._cost, taken = await self._worker.call(_look_at)
        except Unavailable:
            state, taken = None, time.monotonic()
        finally:
            self._looked_at = time.monotonic()
        self._latest = Snapshot(state, changes, taken, self._model_name, self._metrics)

    def _changes(self) -> int:
        """How much has happened that a caller may have seen; it only grows."""
        return self._worker.changes + process_metrics().compilations


def _look_at(engine: ServedEngine) -> tuple[dict[str, Any], float, float]:
    """The state, the seconds that it took, and when it was taken, on the monotonic clock."""
    began, taken = time.perf_counter(), time.monotonic()
    state = engine.state()
    return state, time.perf_counter() - began, taken
