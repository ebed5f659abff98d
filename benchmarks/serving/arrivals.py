"""When requests come: a Poisson process, or a recorded trace."""

import csv
import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emoe_jax.errors import ConfigError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceRow(NamedTuple):
    """One recorded request: seconds since the first one, and its tokens."""

    arrival: float
    prompt_tokens: int
    output_tokens: int


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Arrival times (seconds) of `count` requests at `rate` per second."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return np.cumsum(gaps).tolist()


def read_trace(path: str | Path) -> list[TraceRow]:
    """A CSV in the format of the Azure LLM inference trace 2023, in order of arrival.

    Raises `ConfigError` with one line that names the file, the line and what is wrong.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(f"trace {path}: no column {missing[0]}; it needs {', '.join(COLUMNS)}")
            rows = [_row(path, reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"trace {path}: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise ConfigError(f"trace {path}: no requests")
    rows.sort()
    first = rows[0].arrival
    return [row._replace(arrival=row.arrival - first) for row in rows]


def _row(path: str | Path, line: int, row: dict[str, str | None]) -> TraceRow:
    try:
        time = datetime.datetime.fromisoformat((row["TIMESTAMP"] or "")[:26])
        prompt, output = int(row["ContextTokens"] or ""), int(row["GeneratedTokens"] or "")
    except ValueError as error:
        raise ConfigError(f"trace {path}, line {line}: {error}") from None
    if prompt < 0 or output < 0:
        raise ConfigError(f"trace {path}, line {line}: {prompt} and {output} tokens; they cannot be negative")
    return TraceRow(time.replace(tzinfo=datetime.UTC).timestamp(), max(1, prompt), max(1, output))
