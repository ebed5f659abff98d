"""Records routing to disk while an engine runs."""

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Shaped

from emoe_jax.errors import ConfigError
from emoe_jax.traces.assemble import assemble
from emoe_jax.traces.parts import OTHER, TOKEN, Geometry, TraceParts

FLUSH_BYTES = 1 << 20
MAX_PENDING_BYTES = 64 << 20
FLUSH_SECONDS = 0.5
"""What is pending goes to disk at the latest after so long."""
SNAPSHOT_SECONDS = 1.0
SNAPSHOT_SHARE = 0.02
"""Share of the time that writing snapshots may take, so they become rarer as the trace grows."""

log = logging.getLogger("emoe_jax.traces")


class TraceRecorder:
    """A routing trace in the making. One thread adds; another writes, so adding never waits for the disk.

    Memory is bounded: adding waits while 64 MiB are pending. `path` is brought up to date about every second (every
    50 times the seconds that it takes, for a large trace) and always is a whole trace; what a killed process had on
    disk beyond that is kept beside it (`<path>.parts`), and recording to the same path goes on from there.

    When the disk fails, recording ends with a warning in the log, and `close` raises. A context manager.
    """

    def __init__(
        self,
        path: str | Path,
        num_layers: int,
        num_experts: int,
        top_k: int,
        ranks: int | None = None,
        embedding_size: int = 0,
        tokens: bool = False,
    ):
        """With `ranks` above `top_k` the trace holds so many experts of a token and layer. With `tokens` it holds the
        prompts' token ids, which `begin` must then be given. Raises `ConfigError` when `path` exists, cannot be
        written, or has parts of another model's trace."""
        self.path = Path(path)
        if self.path.suffix != ".npz":
            raise ConfigError(f"{self.path}: the file of a trace must be named *.npz")
        further = 0 if ranks is None else ranks - top_k
        self._parts = TraceParts(self.path, Geometry(num_layers, num_experts, top_k, embedding_size, tokens, further))
        geometry = self._parts.geometry
        self._row, self._prompt, self._top_k = geometry.row, geometry.prompt, top_k
        self._next_sample = self._parts.num_prompts
        self._changed = threading.Condition()
        # shared between the threads, guarded by _changed
        self._prompts: list[tuple[str, np.ndarray, np.ndarray]] = []  # task, record, token ids
        self._rows: list[np.ndarray] = []
        self._pending = 0
        self._closing = False
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="trace recorder", daemon=True)
        self._thread.start()

    def begin(
        self,
        task: str | None,
        length: int,
        embedding: Float[np.ndarray, " d"] | None = None,
        token_ids: Sequence[int] | Int[np.ndarray, " prompt_tokens"] = (),
    ) -> int:
        """A new prompt of `length` tokens; returns its number, the `sample` of its rows. No task counts as `other`."""
        tokens = np.asarray(token_ids if self._parts.geometry.tokens else (), TOKEN)
        if self._parts.geometry.tokens and len(tokens) != length:
            raise ValueError(f"a prompt of {length} tokens came with {len(tokens)} token ids")
        record = np.zeros(1, self._prompt)
        record["length"] = length
        if embedding is not None:
            record["embedding"] = embedding
        with self._changed:
            if self._error is None:
                self._prompts.append((task if task and task.strip() else OTHER, record, tokens))
                self._pending += record.nbytes + tokens.nbytes
            sample, self._next_sample = self._next_sample, self._next_sample + 1
        return sample

    def add(
        self,
        samples: Sequence[int] | Int[np.ndarray, " tokens"],
        positions: Sequence[int] | Int[np.ndarray, " tokens"],
        experts: Shaped[np.ndarray, "tokens M ranks"],
        probs: Float[np.ndarray, "tokens M ranks"],
    ) -> None:
        """Tokens at `positions` of the prompts `samples`, with their routers' choices and what ranks next."""
        rows = np.empty(len(samples), self._row)
        rows["sample"] = samples
        rows["token_pos"] = positions
        for name, ranked in (("experts", experts), ("probs", probs)):
            rows[name], rows[f"further_{name}"] = np.split(ranked, [self._top_k], axis=-1)
        with self._changed:
            while self._pending > MAX_PENDING_BYTES and self._error is None:
                self._changed.wait()
            if self._error is not None:
                return
            self._rows.append(rows)
            self._pending += rows.nbytes
            if self._pending > FLUSH_BYTES:
                self._changed.notify_all()

    def close(self) -> None:
        """Finish the trace: one `.npz` at `path`. Raises `ConfigError` when the disk failed. May be called again."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise ConfigError(f"{self.path}: the trace could not be written: {self._error.strerror}")

    def __enter__(self) -> "TraceRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        """The writing thread."""
        try:
            self._write_until_closed()
            assemble(self._parts)
            self._parts.remove()
        except OSError as error:
            log.warning("recording to %s ended: %s", self.path, error.strerror)
            self._parts.close()
            with self._changed:
                self._error = error
                self._prompts, self._rows, self._pending = [], [], 0
                self._changed.notify_all()

    def _write_until_closed(self) -> None:
        snapshot_rows, due, interval = self._parts.num_rows, 0.0, SNAPSHOT_SECONDS
        closing = False
        while not closing:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._pending > FLUSH_BYTES, FLUSH_SECONDS)
                prompts, rows, closing = self._prompts, self._rows, self._closing
                self._prompts, self._rows, self._pending = [], [], 0
                self._changed.notify_all()
            for task, record, _ in prompts:
                record["task"] = self._parts.task_index(task)
            self._parts.append([record for _, record, _ in prompts], rows, [tokens for _, _, tokens in prompts])
            began = time.monotonic()
            if not closing and began >= due and self._parts.num_rows > snapshot_rows:
                assemble(self._parts)
                snapshot_rows = self._parts.num_rows
                ended = time.monotonic()
                interval = max(SNAPSHOT_SECONDS, (ended - began) / SNAPSHOT_SHARE)
                due = ended + interval


def recover(path: str | Path) -> int:
    """Finish the trace of a process that was killed; returns its tokens. Raises `ConfigError` if there is none."""
    parts = TraceParts(Path(path), None)
    try:
        assemble(parts)
    except OSError as error:
        parts.close()
        raise ConfigError(f"{path}: the trace could not be written: {error.strerror}") from None
    parts.remove()
    return parts.num_rows
