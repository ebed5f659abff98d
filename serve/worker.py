"""The one thread that owns the engine, and the asyncio side's handle on it.

    HTTP handler --submit/abort--> commands --> [thread: admit, step, step, ...] --one batch per step--> event loop

The engine is not thread-safe: everything that touches it runs here, between steps.
"""

import asyncio
import concurrent.futures
import dataclasses
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from emoe_jax.errors import CheckpointError, RequestError
from emoe_jax.requests.request import Delta
from serve.generation import Generation, Submission, Update
from serve.refusals import EngineFailure, QueueFull, Unavailable
from serve.served_engine import ServedEngine
from serve.start_clock import REST_FAILED
from serve.telemetry.stats import RequestStats
from serve.watchdog import PATIENCE_SECONDS, Watchdog

log = logging.getLogger("serve")

UNHEALTHY_AFTER_FAILED_STEPS = 3
TROUBLE_SECONDS = 60.0
"""How long failed steps count: a server that gets no requests for being unhealthy could never show that it works."""
ADMISSION_SECONDS = 0.005
"""Between two steps, for requests that have come; those with many prompts are taken in over several steps."""

Result = TypeVar("Result")


@dataclasses.dataclass(slots=True)
class _Running:
    """A prompt in the engine; `unfinished` of its `n` answers still miss their last delta."""

    generation: Generation
    position: int
    unfinished: int


@dataclasses.dataclass(slots=True)
class _Admission:
    """A request that the engine is taking in; its prompts from `position` on are still to come."""

    generation: Generation
    submissions: Sequence[Submission]
    position: int = 0


class EngineWorker:
    """Runs `engine` on a thread of its own. `max_unfinished` bounds the sequences running and waiting together.

    A step or chore that hangs for `patience` seconds ends all requests; see `Watchdog`. Until it ends none are taken.
    All public methods are for the event loop's thread.
    """

    def __init__(
        self,
        engine: ServedEngine,
        max_unfinished: int,
        patience: float = PATIENCE_SECONDS,
        chores: Iterator[None] | None = None,
    ):
        """`chores` are done one by one while there is no work."""
        self._engine = engine
        self.max_unfinished = max_unfinished
        # shared between the threads, guarded by _wake
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._stopping = False
        self._nudged = False
        # owned by the engine's thread
        self._chores = chores
        self._running: dict[str, _Running] = {}
        self._admissions: deque[_Admission] = deque()
        self._outbox: list[tuple[Generation, Update | Exception | None]] = []
        # owned by the event loop
        self._loop: asyncio.AbstractEventLoop | None = None
        self._live: set[Generation] = set()
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._draining = False
        self.changes = 0
        """How often a request came, was taken by the engine, or ended; each of its prompts counts."""
        self.hurried = False  # a drain that waits should wait no longer; set by a signal handler
        self._numbers = itertools.count()
        self._watchdog = Watchdog(lambda: engine.vitals, patience)
        self._watching: asyncio.Task[None] | None = None
        self.hang: str | None = None
        """What is said of a step that hangs; None while none does."""
        self._failed_steps = 0  # in a row, for other reasons than a file of the checkpoint
        self._failed_at = 0.0
        self._step_began: float | None = None  # read by the event loop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread and deliver to the running event loop. Call it once."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._engine.on_staged(self.nudge)
        self._watching = self._loop.create_task(self._watch())

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread lives, no step hangs, and no run of failed steps ended less than
        `TROUBLE_SECONDS` ago.
        """
        in_trouble = self._failed_steps >= UNHEALTHY_AFTER_FAILED_STEPS
        if in_trouble and time.monotonic() - self._failed_at < TROUBLE_SECONDS:
            return False
        return self._thread.is_alive() and self.hang is None

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.healthy and not self._draining

    @property
    def requests(self) -> int:
        """HTTP requests that the engine has not answered in full."""
        return len(self._live)

    @property
    def unfinished(self) -> int:
        """Sequences of those requests that are not finished."""
        return sum(generation.unfinished for generation in self._live)

    def check_room(self, sequences: int) -> None:
        """Raises `QueueFull` or `Unavailable` where so many more sequences would not be taken now."""
        if self._draining:
            raise Unavailable("the server is shutting down")
        self._check_alive()
        if self.unfinished + sequences > self.max_unfinished:
            raise QueueFull(
                f"{self.unfinished} sequences run or wait and {sequences} more came; at most {self.max_unfinished} "
                "are taken"
            )

    def submit(self, submissions: Sequence[Submission], stats: RequestStats) -> Generation:
        """Queue all prompts or none. Raises `QueueFull` or `Unavailable`."""
        sequences = sum(item.params.n for item in submissions)
        self.check_room(sequences)
        generation = Generation([f"r{next(self._numbers)}" for _ in submissions], sequences, stats, self.abort)
        stats.submitted([len(item.prompt) for item in submissions], [item.params for item in submissions])
        self._live.add(generation)
        self.changes += 1
        self._command(lambda: self._admissions.append(_Admission(generation, submissions)))
        return generation

    def nudge(self) -> None:
        """Have the engine step once even if it has no request: experts wait to be committed. From any thread."""
        with self._wake:
            self._nudged = True
            self._wake.notify()

    def abort(self, generation: Generation) -> None:
        """Free what a generation still has in the engine. Does nothing when it has ended."""
        if generation in self._live:
            self._live.discard(generation)
            self.changes += 1
            generation.stats.end("abort")
            self._command(lambda: self._abort(generation))

    async def call(self, function: Callable[[ServedEngine], Result]) -> Result:
        """Run `function(engine)` between two steps."""
        self._check_alive()
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self._engine))
            except Exception as error:
                future.set_exception(error)

        self._calls.add(future)
        try:
            self._command(command)
            return await asyncio.wrap_future(future)
        finally:
            self._calls.discard(future)

    async def drain(self, timeout: float) -> int:
        """Refuse new work and wait for the old; after `timeout` seconds, or once `hurried`, fail what is left: so many
        requests.
        """
        self._draining = True
        deadline = asyncio.get_running_loop().time() + timeout
        while self._live and not self.hurried and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        left = self.requests
        self._fail_everything(Unavailable("the server is shutting down"))
        return left

    def stop(self, timeout: float = 3.0) -> bool:
        """End the thread after its current step; False when it did not end in time. May be called again."""
        self._draining = True
        if self._watching is not None:
            self._watching.cancel()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _check_alive(self) -> None:
        if not self._thread.is_alive():
            raise Unavailable("the engine has stopped")
        if self.hang is not None:
            raise Unavailable(self.hang)

    async def _watch(self) -> None:
        """Look after the step that runs, until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._watchdog.patience / 4 or 1.0))
            hang = self._watchdog.look(self._step_began)
            if hang is None:
                if self.hang is not None:
                    log.warning("the step that hung is over: requests are taken again")
                self.hang = None
                continue
            if self.hang is None:
                log.error("%s; its requests are ended, and none are taken until it is over", hang)
            self.hang = hang
            self._fail_everything(Unavailable(hang))

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _fail_everything(self, error: Exception) -> None:
        for generation in list(self._live):
            generation.deliver(error)
            self.abort(generation)
        for future in list(self._calls):
            future.cancel()

    def _deliver(self, batch: list[tuple[Generation, Update | Exception | None]]) -> None:
        for generation, event in batch:
            if generation not in self._live:
                continue
            generation.deliver(event)
            if not isinstance(event, Update) or event.output is not None:
                self.changes += 1
            if isinstance(event, Update) and event.delta.finish_reason is not None:
                generation.unfinished -= 1
            if isinstance(event, Exception) or not generation.unfinished:
                self._live.discard(generation)

    # From here on: the engine's thread.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._admit()
                self._post()
                self._step_began = time.monotonic()
                if self._engine.has_work() or self._take_nudge():
                    self._step()
                    self._post()
                elif self._chores is not None:
                    self._do_chore(self._chores)
        except BaseException:
            log.exception("the engine's thread ended")
            self._on_loop(lambda: self._fail_everything(EngineFailure("the engine has stopped")))

    def _do_chore(self, chores: Iterator[None]) -> None:
        """The next one; those behind one that fails are left undone."""
        try:
            next(chores)
        except StopIteration:
            self._chores = None
        except Exception:
            log.exception(REST_FAILED)
            self._chores = None

    def _take_nudge(self) -> bool:
        with self._wake:
            nudged, self._nudged = self._nudged, False
            return nudged

    def _wait_for_work(self) -> bool:
        """Run the commands that came in; sleep when there is nothing to do. False when asked to stop."""
        self._step_began = None
        with self._wake:
            while self._chores is None and not (
                self._commands or self._admissions or self._stopping or self._nudged or self._engine.has_work()
            ):
                self._wake.wait()
            commands, self._commands = self._commands, []
            stopping = self._stopping
        for command in commands:
            command()
        return not stopping

    def _admit(self) -> None:
        """Take in prompts for a moment, one of each request in turn: a step is never far away."""
        ends = time.monotonic() + ADMISSION_SECONDS
        while self._admissions:
            admission = self._admissions.popleft()
            self._admit_next(admission)
            if time.monotonic() >= ends:
                return

    def _admit_next(self, admission: "_Admission") -> None:
        generation, position = admission.generation, admission.position
        request_id, item = generation.request_ids[position], admission.submissions[position]
        try:
            self._engine.add_request(
                request_id,
                item.prompt,
                item.params,
                task=item.task,
                routing=item.routing,
                tolerance=item.tolerance,
                slo=item.slo,
                arrival=generation.stats.arrived,
                cache_salt=item.cache_salt,
            )
        except Exception as error:
            self._abort(generation)
            self._outbox.append((generation, error if isinstance(error, RequestError) else self._failure(error)))
            return
        self._running[request_id] = _Running(generation, position, item.params.n)
        if position + 1 < len(admission.submissions):
            admission.position += 1
            self._admissions.append(admission)
        else:
            self._outbox.append((generation, None))

    def _abort(self, generation: Generation) -> None:
        self._admissions = deque(item for item in self._admissions if item.generation is not generation)
        for request_id in generation.request_ids:
            if self._running.pop(request_id, None):
                self._engine.pop(request_id)

    def _step(self) -> None:
        try:
            for delta in self._engine.step():
                self._record(delta)
            self._failed_steps = 0
        except Exception as error:
            self._note_failure(error)
            failure = self._failure(error)
            ended = [request_id for request_id in self._running if self._has_ended(request_id)]
            # An error outside the batch ends nothing by itself; then it cannot be told whose it is.
            for generation in {self._running[request_id].generation for request_id in ended or self._running}:
                self._abort(generation)
                self._outbox.append((generation, failure))

    def _note_failure(self, error: Exception) -> None:
        """An expert that cannot be read ends the requests that need it. Others go on without it, so that the engine is
        not in trouble.
        """
        if isinstance(error, CheckpointError):
            return
        now = time.monotonic()
        if now - self._failed_at >= TROUBLE_SECONDS:
            self._failed_steps = 0
        self._failed_steps += 1
        self._failed_at = now

    def _has_ended(self, request_id: str) -> bool:
        return any(completion.finish_reason == "error" for completion in self._engine.output(request_id).completions)

    def _record(self, delta: Delta) -> None:
        running = self._running.get(delta.request_id)
        if running is None:
            return  # the last word of a request that was aborted
        running.unfinished -= delta.finish_reason is not None
        output = None
        if not running.unfinished:
            output = self._engine.pop(delta.request_id)
            del self._running[delta.request_id]
        self._outbox.append((running.generation, Update(running.position, delta, output)))

    def _failure(self, error: Exception) -> EngineFailure:
        log.error("the engine failed", exc_info=error)
        return EngineFailure(f"the engine failed on this request ({type(error).__name__})")

    def _post(self) -> None:
        if self._outbox:
            batch, self._outbox = self._outbox, []
            self._on_loop(lambda: self._deliver(batch))

    def _on_loop(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            log.debug("the event loop closed before the engine's thread did")
