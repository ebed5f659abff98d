"""Hours of mixed load on a real server, in fast motion or not: `python -m benchmarks.soak --minutes 30 --json FILE`.

Users ask one thing after the other: whole answers and streams of the demo's tasks under both contracts, streams that
they leave in the middle, requests that are wrong in some way, and looks at the server's state. Reported are what the
server's memory does (least squares over the samples of the last two thirds, as caches fill first), compilations,
and whatever was not answered as it should have been.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks.arguments import positive
from benchmarks.serving.workload import Samples, demo_samples
from emoe_jax.errors import EmoeError, one_line

try:
    import httpx

    from benchmarks.serving.client import TIMEOUT
    from benchmarks.serving.server import ServerFailed, started_server
except ModuleNotFoundError as error:
    sys.exit(f"error: {one_line(error)}")

CHAT = "/v1/chat/completions"
KINDS = {"whole": 4, "stream": 4, "cut stream": 4, "bad": 3, "look": 1}
"""What users do, and how often relative to each other."""

BAD: tuple[tuple[str, bytes], ...] = (
    (CHAT, b'{"messages": []}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "n": 1000000000}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema"}}'),
    ("/v1/completions", b'{"prompt": ' + b"[" * 10_000),
    ("/v1/completions", b'{"prompt": "' + b"a" * 1_000_000 + b'"}'),
    ("/v1/completions", b'{"prompt": [99999999]}'),
    ("/v1/completions", b'{"prompt": "a", "model": "another"}'),
    ("/v1/nothing", b"{}"),
)
LOOKS = ("/v1/models", "/v1/emoe/state", "/metrics", "/health", "/")
MAX_TOKENS = 64
MAX_REPORTED = 20


class Soak:
    """Users of one server until `deadline` on the monotonic clock, and what they met."""

    def __init__(self, http: httpx.AsyncClient, samples: Samples, deadline: float, seed: int):
        self._http = http
        self._samples = samples
        self._deadline = deadline
        self._random = random.Random(seed)
        self.requests: Counter[str] = Counter()
        self.refused = 0
        self.errors: list[str] = []

    async def user(self) -> None:
        kinds, weights = list(KINDS), list(KINDS.values())
        while time.monotonic() < self._deadline:
            (kind,) = self._random.choices(kinds, weights)
            self.requests[kind] += 1
            try:
                problem = await {
                    "whole": self._whole,
                    "stream": self._stream,
                    "cut stream": self._cut,
                    "bad": self._bad,
                    "look": self._look,
                }[kind]()
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__} {error}"
            if problem is not None:
                self.errors.append(f"{kind}: {problem}"[:300])

    def _body(self) -> dict[str, Any]:
        draw = self._random
        task = draw.choice(sorted(self._samples))
        body: dict[str, Any] = {
            "messages": draw.choice(self._samples[task]).messages,
            "max_completion_tokens": draw.randint(1, MAX_TOKENS),
            "temperature": draw.choice((0, 0.8)),
            "n": draw.choice((1, 1, 1, 3)),
            "emoe": {"routing": draw.choice(("resident", "resident", "bounded", "exact"))},
        }
        if draw.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 3, "presence_penalty": 0.5, "stop": ["."]}
        return body

    async def _whole(self) -> str | None:
        answer = await self._http.post(CHAT, json=self._body())
        return self._unless_refused(answer.status_code, answer.text)

    async def _stream(self) -> str | None:
        last = ""
        async with self._http.stream("POST", CHAT, json={**self._body(), "stream": True}) as response:
            if response.status_code != 200:
                return self._unless_refused(response.status_code, (await response.aread()).decode())
            async for line in response.aiter_lines():
                if '"error"' in line[:20]:
                    return line
                last = line or last
        return None if last == "data: [DONE]" else f"a stream ended with {last[:100]!r}"

    async def _cut(self) -> str | None:
        events = self._random.randint(0, 5)
        async with self._http.stream("POST", CHAT, json={**self._body(), "stream": True}) as response:
            if response.status_code != 200:
                return self._unless_refused(response.status_code, (await response.aread()).decode())
            async for _ in response.aiter_lines():
                events -= 1
                if events < 0:
                    break
        return None

    async def _bad(self) -> str | None:
        path, content = self._random.choice(BAD)
        answer = await self._http.post(path, content=content, headers={"content-type": "application/json"})
        return None if 400 <= answer.status_code < 500 else f"{answer.status_code} for {path} {content[:60]!r}"

    async def _look(self) -> str | None:
        path = self._random.choice(LOOKS)
        answer = await self._http.get(path)
        return None if answer.status_code == 200 else f"{answer.status_code} for {path}"

    def _unless_refused(self, status: int, text: str) -> str | None:
        """A full queue is no error."""
        self.refused += status == 503
        return None if status in (200, 503) else f"{status} {text}"


async def soak(url: str, samples: Samples, minutes: float, users: int, seed: int) -> dict[str, Any]:
    """The report. Raises `ServerFailed` when the server cannot be measured."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=users)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=TIMEOUT, trust_env=False) as http:
        began = time.monotonic()
        load = Soak(http, samples, began + 60 * minutes, seed)
        times, memory = [], []
        before = await _metrics(http)
        working = asyncio.gather(*(load.user() for _ in range(users)))
        async for seconds in _ticks(working, max(0.1, 60 * minutes / 300)):
            values = await _metrics(http)
            times.append(seconds)
            memory.append(values["process_resident_memory_bytes"] / 1e6)
        await working
        ended = time.monotonic()
        left = await _left(http)
        after = await _metrics(http)
    return {
        "minutes": (ended - began) / 60,
        "users": users,
        "requests": dict(sorted(load.requests.items())),
        "refused": load.refused,
        "errors": len(load.errors),
        "first_errors": load.errors[:MAX_REPORTED],
        "rss_begin_mb": memory[0],
        "rss_end_mb": memory[-1],
        "rss_slope_mb_per_min": slope(times, memory),
        "compilations": after["emoe:compilations_total"] - before["emoe:compilations_total"],
        **left,
    }


async def _ticks(working: asyncio.Future[Any], seconds: float) -> AsyncIterator[float]:
    """The time since the start, every so many seconds, until the work is done."""
    began = time.monotonic()
    while not working.done():
        yield time.monotonic() - began
        await asyncio.wait([working], timeout=seconds)


async def _metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """Values by name, of those without labels that matter here."""
    try:
        text = (await http.get("/metrics")).raise_for_status().text
    except httpx.HTTPError as error:
        raise ServerFailed(f"the server's /metrics cannot be read: {error or type(error).__name__}") from None
    values = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    if "process_resident_memory_bytes" not in values or "emoe:compilations_total" not in values:
        raise ServerFailed("the server's /metrics say nothing of its memory and compilations")
    return values


async def _left(http: httpx.AsyncClient) -> dict[str, Any]:
    """What still runs or is held a second after the last request."""
    await asyncio.sleep(1)
    scheduler = (await http.get("/v1/emoe/state")).json()["scheduler"]
    return {f"{name}_left": scheduler[name] for name in ("running", "waiting", "pages_used")}


def slope(minutes_as_seconds: Sequence[float], megabytes: Sequence[float]) -> float | None:
    """Growth per minute in the last two thirds of the time; None for too few samples."""
    times, values = np.asarray(minutes_as_seconds) / 60, np.asarray(megabytes)
    late = times >= times[-1] / 3
    return float(np.polyfit(times[late], values[late], 1)[0]) if late.sum() >= 3 else None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        report = _measured(options)
        show(report, Console())
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    except (EmoeError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    samples = demo_samples()
    if options.url:
        return asyncio.run(soak(options.url, samples, options.minutes, options.users, options.seed))
    with started_server(["--prefix-caching", *options.server_args]) as url:
        return asyncio.run(soak(url, samples, options.minutes, options.users, options.seed))


def show(report: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False, title=f"{report['minutes']:.1f} minutes of {report['users']} users")
    for name, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{count} {kind}" for kind, count in value.items())
        elif isinstance(value, list):
            value = "\n".join(value)
        table.add_row(name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else str(value))
    console.print(table, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description="Long mixed load: does the server's memory grow?"
    )
    add = parser.add_argument
    add("--minutes", type=positive, default=30.0, help="how long (default %(default)s)")
    add("--users", type=int, default=24, choices=range(1, 1001), metavar="N", help="at once (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write the numbers there")
    add("--url", help="a running server of the demo model (default: start one)")
    add("--server-args", nargs=argparse.REMAINDER, default=[], help="the rest of the line goes to the started server")
    return parser


if __name__ == "__main__":
    sys.exit(main())
