"""Two replicas under Ray Serve as they are started by users; one is killed under load. Takes minutes, so ask for it."""

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve.checkpoint import write_tiny_checkpoint
from tests.serve.process import REPOSITORY

pytestmark = [
    pytest.mark.skipif("EMOE_RAY_LIVE" not in os.environ, reason="takes minutes: set EMOE_RAY_LIVE"),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]

READY_SECONDS = 600.0
USERS, REQUESTS, KILL_AFTER = 8, 160, 40


@contextlib.contextmanager
def started(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.ray_app", "--port", "0", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Serving on "):
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(READY_SECONDS), "".join(lines)
        yield process, next(line.split()[-1] for line in lines if line.startswith("Serving on "))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(60)
        if process.stdout is not None:
            process.stdout.close()


def replicas_of(process: int) -> list[int]:
    """Replica processes among the descendants of a process."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = []
    for number in parents:
        ancestor = number
        while ancestor in parents and ancestor != process:
            ancestor = parents[ancestor]
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{number}/cmdline").read_bytes()
            if ancestor == process and command.startswith(b"ray::ServeReplica:emoe:Replica"):
                found.append(number)
    return found


def published(url: str) -> dict[str, int]:
    """Answers by replica, once both replicas have published theirs."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        replicas = httpx.get(f"{url}/v1/emoe/replicas", trust_env=False).json()["replicas"]
        if len(replicas) == 2 and None not in (counts := {one["name"]: one["answers"] for one in replicas}).values():
            return counts
        assert time.monotonic() < deadline, replicas
        time.sleep(0.5)


def test_a_replica_that_is_killed_under_load_loses_no_request(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the ray extra")
    write_tiny_checkpoint(tmp_path)
    with started(["--model", str(tmp_path), "--expert-memory", "4 slots", "--replicas", "2"]) as (process, url):
        assert len(replicas_of(process.pid)) == 2
        assert sorted(published(url).values()) == [0, 0]
        for name in published(url):  # the dashboard asks each for its state
            state = httpx.get(f"{url}/v1/emoe/state", headers={"x-emoe-replica": name}, trust_env=False)
            assert state.headers["x-emoe-replica"] == name
        answered: list[str] = []
        broken: list[int] = []
        kill = threading.Lock()

        def ask(index: int) -> str:
            body = {"prompt": f"hello {index}", "max_tokens": 8, "stream": bool(index % 2), "ignore_eos": True}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300, trust_env=False)
            assert answer.status_code == 200, answer.text
            if body["stream"] and not answer.text.rstrip().endswith("data: [DONE]"):
                # It had begun, so it cannot be answered by another replica.
                assert "the replica that answered has died" in answer.text
                broken.append(index)
            answered.append(answer.headers["x-emoe-replica"])
            if len(answered) >= KILL_AFTER and kill.acquire(blocking=False):
                os.kill(replicas_of(process.pid)[0], signal.SIGKILL)
            return answer.headers["x-emoe-replica"]

        with concurrent.futures.ThreadPoolExecutor(USERS) as users:
            replicas = Counter(users.map(ask, range(REQUESTS)))
        assert len(broken) < USERS
        assert len(replicas) >= 2
        (survivor, count), *_ = replicas.most_common()
        assert count > REQUESTS / 2  # it took over
        deadline = time.monotonic() + READY_SECONDS
        while {httpx.get(f"{url}/health", trust_env=False).headers["x-emoe-replica"] for _ in range(20)} == {survivor}:
            assert time.monotonic() < deadline, "Ray has not replaced the replica"
            time.sleep(1)
        counts = published(url)
        assert counts[survivor] == count
    assert process.returncode == 0
