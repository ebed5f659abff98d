"""`python -m serve.main` as a process of its own, for as long as it is measured."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import httpx

from emoe_jax.errors import EmoeError
from serve.start_clock import ALL_COMPILED, REST_FAILED

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = "serve.main"
FIXED = ("--no-prefix-caching", "--expert-memory", "40%", "--routing", "resident", "--audit-rate", "0")
"""What is measured computes a prompt each time it is drawn, has experts to load, and does nothing besides. Later flags
win."""
READY_SECONDS = 900.0
"""A first start compiles every shape that a step can have."""
STOP_SECONDS = 15.0
MAX_OUTPUT = 2**20
"""Bytes of its output that are read."""


class ServerFailed(EmoeError):
    """The measured server did not start, refused a request, or broke off an answer."""


@contextlib.contextmanager
def started_server(arguments: Sequence[str]) -> Iterator[str]:
    """The URL of a server on a free port, which computes a prompt each time it is drawn. Whatever ends the block,
    SIGTERM included, ends the server too.
    """
    with tempfile.TemporaryFile() as output, _exit_on_sigterm():
        fixed = ["--port", "0", "--shutdown-timeout", "2", *FIXED]
        command = [sys.executable, "-m", MODULE, *fixed, *arguments]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield _ready_url(process, output, time.monotonic() + READY_SECONDS)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready_url(process: subprocess.Popen[bytes], output: IO[bytes], deadline: float) -> str:
    """Waits for the line that names the URL, for /health, and until no step is left to be compiled or read."""
    url = None
    while time.monotonic() < deadline:
        status = process.poll()
        lines = _lines(output)
        if status is not None:
            raise ServerFailed(f"the server ended with status {status}: {lines[-1] if lines else 'it printed nothing'}")
        if any(REST_FAILED in line for line in lines):
            raise ServerFailed(f"{REST_FAILED}: {lines[-1]}")
        url = next((line.split()[-1] for line in lines if line.startswith("Serving on ")), None)
        if url is not None and any(ALL_COMPILED in line for line in lines) and _healthy(url):
            return url
        time.sleep(0.1)
    raise ServerFailed("the server was not ready in time")


def _lines(output: IO[bytes]) -> list[str]:
    """What the server has printed."""
    printed = os.pread(output.fileno(), MAX_OUTPUT, 0)  # without moving the position, which the server's writes share
    return [line.strip() for line in printed.decode(errors="replace").splitlines() if line.strip()]


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
