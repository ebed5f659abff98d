"""A trace while it is being recorded: append-only files of fixed-size records beside the `.npz` that it becomes.

    trace.npz.parts/  header.json   what the records look like
                      tasks.jsonl   one task name a line
                      prompts.bin   one record per prompt, in order of arrival
                      tokens.bin    the prompts' token ids, end to end, where these are recorded
                      rows.bin      one record per token, in order of computation

Records only ever go to the end and refer to earlier ones, so whatever a killed process left is a valid recording once
incomplete records are cut off.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from emoe_jax.errors import ConfigError

FORMAT = 1
MAX_TASKS = 1024
"""Names kept apart; clients choose them, so there must be an end to it. Later ones count as `other`."""
OTHER = "other"
TOKEN = np.dtype("<i4")
"""What token ids are stored in."""


def expert_dtype(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    """What a trace stores expert numbers in."""
    return np.uint8 if num_experts <= 256 else np.uint16


class Geometry(NamedTuple):
    """What must agree for two recordings to go on in one file. `embedding_size` 0: prompts have no embedding;
    `tokens`: the recording holds the prompts' token ids; `further`: experts of a token and layer behind the `top_k`."""

    num_layers: int
    num_experts: int
    top_k: int
    embedding_size: int = 0
    tokens: bool = False
    further: int = 0

    @property
    def row(self) -> np.dtype:
        """The dtype of one token's record. `probs` are float16; `sample` is the number of its prompt."""
        experts = expert_dtype(self.num_experts)
        fields: list[tuple[Any, ...]] = [("sample", "<i4"), ("token_pos", "<i4")]
        for prefix, ranks in (("", self.top_k), ("further_", self.further)):
            shape = (self.num_layers, ranks)
            fields += [(f"{prefix}experts", experts, shape), (f"{prefix}probs", "<f2", shape)]
        return np.dtype(fields)

    @property
    def prompt(self) -> np.dtype:
        """The dtype of one prompt's record. `length` is in tokens; `task` is an index of the task names."""
        return np.dtype([("task", "<i2"), ("length", "<i4"), ("embedding", "<f2", (self.embedding_size,))])


class TraceParts:
    """The files of one recording, locked against other processes. Raises `ConfigError` when they cannot be used."""

    def __init__(self, path: Path, geometry: Geometry | None):
        """Start a recording that becomes `path`, or go on with one that was cut off; `geometry=None` takes its own."""
        self.path = path
        self.directory = parts_of(path)
        try:
            found = self._claim(geometry)
        except OSError as error:
            raise ConfigError(f"{path}: a trace cannot be recorded there: {error.strerror}") from None
        if geometry is not None and found != geometry:
            self.close()
            if found._replace(tokens=geometry.tokens, further=geometry.further) != geometry:
                raise ConfigError(
                    f"{self.directory} holds a recording of another model, {found}; this one is {geometry}"
                )
            if found.further != geometry.further:
                raise ConfigError(
                    f"{self.directory} holds a recording of {found.top_k + found.further} ranks; this one has "
                    f"{geometry.top_k + geometry.further} (trace_ranks)"
                )
            how = ("without", "with") if geometry.tokens else ("with", "without")
            raise ConfigError(
                f"{self.directory} holds a recording {how[0]} the tokens of its prompts; this one is {how[1]} them"
            )
        self.geometry = found
        self.tasks = [json.loads(line) for line in self._whole_lines("tasks.jsonl")]
        self.num_prompts = self._cut_prompts() if found.tokens else self._cut("prompts.bin", found.prompt.itemsize)
        self.num_rows = self._cut("rows.bin", found.row.itemsize)
        self._files: dict[str, BinaryIO] = {}

    def task_index(self, name: str) -> int:
        """The number of a task name, new or known."""
        if name not in self.tasks:
            if len(self.tasks) >= MAX_TASKS and name != OTHER:
                return self.task_index(OTHER)
            self._append("tasks.jsonl", (json.dumps(name) + "\n").encode())
            self.tasks.append(name)
        return self.tasks.index(name)

    def append(
        self, prompts: Sequence[np.ndarray], rows: Sequence[np.ndarray], tokens: Sequence[np.ndarray] = ()
    ) -> None:
        """Add records. Rows may refer to the prompts that come with them; `tokens` are the ids of these prompts."""
        for name, records in (("tokens.bin", tokens), ("prompts.bin", prompts), ("rows.bin", rows)):
            if records:
                self._append(name, np.concatenate(records).tobytes())
        self.num_prompts += sum(map(len, prompts))
        self.num_rows += sum(map(len, rows))

    def prompts(self) -> np.ndarray:
        """All prompt records, from the disk."""
        return self._mapped("prompts.bin", self.geometry.prompt, self.num_prompts)

    def rows(self) -> np.ndarray:
        """All row records, from the disk."""
        return self._mapped("rows.bin", self.geometry.row, self.num_rows)

    def tokens(self) -> np.ndarray:
        """Token ids of all prompts, end to end, from the disk."""
        return self._mapped("tokens.bin", TOKEN, int(self.prompts()["length"].sum(dtype=np.int64)))

    def close(self) -> None:
        """Close the files and release the lock. The files stay, to be continued or assembled."""
        for file in getattr(self, "_files", {}).values():
            file.close()
        os.close(self._lock)

    def remove(self) -> None:
        """Delete the parts; the trace has been assembled."""
        self.close()
        shutil.rmtree(self.directory)

    def _claim(self, geometry: Geometry | None) -> Geometry:
        header = self.directory / "header.json"
        if not header.exists():
            if geometry is None:
                raise ConfigError(f"{self.path}: there is no recording to recover ({self.directory} is missing)")
            if self.path.exists():
                raise ConfigError(f"{self.path} exists; choose another file for the trace or remove it")
            self.directory.mkdir(exist_ok=True)
            draft = self.directory / "header.draft"
            draft.write_text(json.dumps({"format": FORMAT, **geometry._asdict()}))
            draft.replace(header)
        self._lock = os.open(header, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(f"{self.path} is being recorded by another process") from None
        try:
            values = json.loads(header.read_text())
            if values.pop("format") != FORMAT:
                raise ValueError
            return Geometry(**values)
        except (ValueError, KeyError, TypeError, AttributeError):
            os.close(self._lock)
            raise ConfigError(f"{header} is not the header of a recording; remove {self.directory}") from None

    def _append(self, name: str, data: bytes) -> None:
        if name not in self._files:
            self._files[name] = (self.directory / name).open("ab", buffering=0)
        rest = memoryview(data)
        while rest:
            rest = rest[self._files[name].write(rest) :]

    def _cut(self, name: str, size: int) -> int:
        """Cut off an incomplete record at the end of a file; returns how many whole ones there are."""
        path = self.directory / name
        path.touch()
        whole = path.stat().st_size // size
        os.truncate(path, whole * size)
        return whole

    def _cut_prompts(self) -> int:
        """Cut off prompts whose tokens are incomplete, and tokens of prompts that are; returns how many are left."""
        written = self._cut("tokens.bin", TOKEN.itemsize)
        number = self._cut("prompts.bin", self.geometry.prompt.itemsize)
        ends = np.cumsum(self._mapped("prompts.bin", self.geometry.prompt, number)["length"], dtype=np.int64)
        whole = int(np.searchsorted(ends, written, side="right"))
        os.truncate(self.directory / "prompts.bin", whole * self.geometry.prompt.itemsize)
        os.truncate(self.directory / "tokens.bin", (int(ends[whole - 1]) if whole else 0) * TOKEN.itemsize)
        return whole

    def _whole_lines(self, name: str) -> list[str]:
        path = self.directory / name
        path.touch()
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        os.truncate(path, len(whole.encode()))
        return whole.splitlines()

    def _mapped(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        if not count:
            return np.empty(0, dtype)
        return np.memmap(self.directory / name, dtype, "r", shape=(count,))


def parts_of(path: Path) -> Path:
    """Where the parts of a trace are while it is being recorded."""
    return path.with_name(path.name + ".parts")
