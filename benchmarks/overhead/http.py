"""What the HTTP layer adds to each token of many streams, seen by a client in another process."""

import asyncio
import json
import multiprocessing
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.overhead.scripted import run_server
from benchmarks.serving.server import ServerFailed

READY_SECONDS = 120.0


def http_overhead(streams: int, tokens: int, period: float) -> dict[str, float]:
    """Milliseconds per token: the server's CPU time, and the delay from the engine's step to the client.

    Every step gives all streams a token at once, so that the delay contains the wait for the other streams' tokens.
    """
    spawn = multiprocessing.get_context("spawn")
    ready, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=run_server, args=(period, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        try:
            url = ready.recv() if ready.poll(READY_SECONDS) else None
        except EOFError:
            url = None
        if url is None:
            raise ServerFailed("the server that is measured did not start")
        asyncio.run(_all(url, streams, max(2, tokens // 10)))  # what happens once
        before = _cpu_seconds(url)
        delays = asyncio.run(_all(url, streams, tokens))
        cpu = _cpu_seconds(url) - before
    finally:
        process.terminate()
        process.join()
    return {
        "http_cpu_ms_per_token": 1e3 * cpu / len(delays),
        "http_delay_ms_median": 1e3 * float(np.median(delays)),
        "http_delay_ms_p99": 1e3 * float(np.percentile(delays, 99)),
        "tokens": len(delays),
    }


async def _all(url: str, streams: int, tokens: int) -> list[float]:
    """Delays of all tokens in seconds."""
    found = await asyncio.gather(*(_stream(url, tokens) for _ in range(streams)))
    return [delay for delays in found for delay in delays]


async def _stream(url: str, tokens: int) -> list[float]:
    """One stream over a bare socket: a client's own work counts as delay, so it does little."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    body = json.dumps({"prompt": [1], "max_tokens": tokens, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    lines: list[tuple[float, bytes]] = []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            lines.append((time.monotonic(), line[6:]))
    writer.close()
    if len(lines) != tokens:
        raise ServerFailed(f"a stream had {len(lines)} events instead of {tokens}")
    return [seen - _made(line) for seen, line in lines]


def _made(line: bytes) -> float:
    """When the engine made an event's token."""
    event: dict[str, Any] = json.loads(line)
    return float(event["choices"][0]["text"].split()[0])


def _cpu_seconds(url: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "process_cpu_seconds_total":
                return sample.value
    raise ServerFailed("the server's /metrics say nothing of its CPU time")
