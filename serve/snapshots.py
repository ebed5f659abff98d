"""The engine's state and all metrics as of a moment ago: computed a few times a second, shared by all callers."""

import asyncio
import dataclasses
import functools
import time
from typing import Any

import pydantic_core

from serve.engine_metrics import engine_families
from serve.metrics import RequestMetrics, exposition
from serve.process_metrics import process_metrics
from serve.worker import EngineWorker, Unavailable

REFRESH_SECONDS = 0.25
"""Between two looks at the engine, however many callers ask; also the greatest age of what a caller gets, a step's
duration aside.
"""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a look at the engine has found, and the bytes that callers get of it, each made once."""

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
    """Looks at the engine at most once in `REFRESH_SECONDS`, between two of its steps, and only when a caller asks.

    What a caller gets is at most `REFRESH_SECONDS` old, and never older than the last change that clients know of: a
    request that came or ended, a compilation. Where the last look is too old but also too recent to look again, the
    caller waits for the next one. Lives on the event loop.
    """

    def __init__(self, worker: EngineWorker, metrics: RequestMetrics, model_name: str):
        self._worker = worker
        self._metrics = metrics
        self._model_name = model_name
        self._latest: Snapshot | None = None
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = -REFRESH_SECONDS
        process_metrics()  # counts compilations from now on

    async def current(self) -> Snapshot:
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
        await asyncio.sleep(self._looked_at + REFRESH_SECONDS - time.monotonic())
        changes = self._changes()
        try:
            state, taken = await self._worker.call(lambda engine: (engine.state(), time.monotonic()))
        except Unavailable:
            state, taken = None, time.monotonic()
        finally:
            self._looked_at = time.monotonic()
        self._latest = Snapshot(state, changes, taken, self._model_name, self._metrics)

    def _changes(self) -> int:
        """How much has happened that a caller may have seen; it only grows."""
        return self._worker.changes + process_metrics().compilations
