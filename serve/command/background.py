"""The server that a chat talks to: one that runs, or one that is started for it and ends with it."""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import httpx
from rich.console import Console
from rich.text import Text

from serve.command.conversation import ChatFailed

URL = "http://127.0.0.1:8000"
"""Where `emoe serve` listens unless it is told otherwise."""

READY_SECONDS = 1800.0
"""A first start compiles every shape that a step can have."""
STOP_SECONDS = 10.0


class Served(NamedTuple):
    """What a server says of its model."""

    names: list[str]
    tasks: list[str] | None
    """Those that a message may name; None where it may name any, or of another server."""


def served_by(url: str, api_key: str | None) -> Served | None:
    """What a server serves; None where none answers. Raises `ChatFailed` where it refuses."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        response = httpx.get(f"{url}/v1/models", headers=headers, timeout=5.0, trust_env=False)
        if response.status_code == 401:
            raise ChatFailed(f"{url} asks for a key; give its --api-key")
        models = response.json()["data"]
        return Served([str(model["id"]) for model in models], models[0].get("tasks"))
    except httpx.InvalidURL as error:
        raise ChatFailed(f"{url} is no URL: {error}") from None
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return None


@contextlib.contextmanager
def started(model: str, arguments: Sequence[str], console: Console) -> Iterator[str]:
    """The URL of a server for a model, on a free port. It ends with the block, and when this process gets SIGTERM or
    loses its terminal.

    Ctrl-C does not reach it. Raises `ChatFailed` with its last line where it does not start.
    """
    with tempfile.NamedTemporaryFile(prefix="emoe-serve-", suffix=".log") as log, _exit_on_signal():
        command = [sys.executable, "-m", "serve.main", "--model", model, "--port", "0", "--shutdown-timeout", "2"]
        process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log, start_new_session=True)
        try:
            console.print(f"starting a server for {model}", style="dim", markup=False, highlight=False, soft_wrap=True)
            with console.status("") as status:
                url = _ready_url(process, Path(log.name), lambda line: status.update(Text(line, style="dim")))
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready_url(process: subprocess.Popen[bytes], log: Path, report: Callable[[str], None]) -> str:
    """The URL that the server prints; `report` is told its newest line."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        sentences = [line for line in lines if not is_of_a_table(line)]
        for line in lines:
            if line.startswith("Serving on "):
                return line.split()[-1]
        if ended:
            last = lines[-1].removeprefix("error: ") if lines else "it printed nothing"
            raise ChatFailed(f"the server did not start: {last}")
        report(sentences[-1] if sentences else "")
        time.sleep(0.1)
    raise ChatFailed(f"the server was not ready within {READY_SECONDS:.0f} s")


def is_of_a_table(line: str) -> bool:
    """Whether a line that a server prints is a row or a border of its table: by itself it says nothing."""
    return line[:1] in "┌├└│┏┡┗┃+|"


@contextlib.contextmanager
def _exit_on_signal() -> Iterator[None]:
    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
