"""`python -m serve.main` as a process of its own."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.compilations import UNOPTIMISED

REPOSITORY = Path(__file__).resolve().parents[2]


class ServerProcess:
    """A started server; `output` collects what it prints."""

    def __init__(
        self,
        arguments: tuple[str, ...],
        environment: Mapping[str, str] | None = None,
        listen: tuple[str, ...] = ("--port", "0"),
        module: str = "serve.main",
    ):
        self.output: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *listen, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **UNOPTIMISED, "JAX_PLATFORMS": "cpu", "COLUMNS": "120", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if line.startswith("Serving on "):
                self.url = line.split()[-1]
                self._ready.set()
        self._ready.set()

    def wait_until_ready(self, seconds: float) -> None:
        assert self._ready.wait(seconds), "".join(self.output)
        assert self.url, "".join(self.output)

    def wait_for(self, text: str, seconds: float) -> None:
        """Until a line with `text` has been printed."""
        deadline = time.monotonic() + seconds
        while not any(text in line for line in self.output):
            assert self.process.poll() is None, "".join(self.output)
            assert time.monotonic() < deadline, "".join(self.output)
            time.sleep(0.01)

    def wait(self, seconds: float) -> int:
        """The exit status."""
        status = self.process.wait(seconds)
        self._reader.join()
        return status

    def close(self) -> None:
        self.process.kill()
        self.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def server_process(*arguments: str, seconds: float = 300.0) -> Iterator[ServerProcess]:
    server = ServerProcess(arguments)
    try:
        server.wait_until_ready(seconds)
        yield server
    finally:
        server.close()
