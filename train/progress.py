"""What every training command shows and keeps while it runs: a progress bar, and a history that survives kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(console: Console, counted: str) -> Progress:
    """A bar that counts `counted` things, with a description and the time passed and left."""
    return Progress(
        TextColumn(counted),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


class RunHistory:
    """Every step as a JSON line; a resumed run drops what the killed one wrote after its checkpoint."""

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_history(path) if line["step"] <= first_step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file: TextIO = path.open("a")

    def add(self, line: dict[str, Any]) -> None:
        """`line["step"]` is the step's number."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a history; the last one may be cut short by a kill and is then left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
