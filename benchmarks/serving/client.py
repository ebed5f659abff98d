"""Requests over HTTP, timed from outside: streamed chat completions."""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import httpx

from benchmarks.serving.report import Record
from benchmarks.serving.server import ServerFailed
from benchmarks.serving.workload import Job

TIMEOUT = 300.0
"""Seconds without a byte after which a request counts as failed."""

clock = time.perf_counter


class Target(Protocol):
    """Something that answers jobs."""

    async def begin(self) -> None:
        """Get ready for a part of a run. Nothing is being answered."""
        ...

    async def answer(self, job: Job, began: float) -> Record:
        """Send a job and read its answer; `began` is when the run did, on `clock`."""
        ...


class Client:
    """Sends jobs to one server. Raises `ServerFailed`, one line, for whatever is not a whole answer."""

    def __init__(self, http: httpx.AsyncClient, max_tokens: int):
        self._http = http
        self._max_tokens = max_tokens

    async def state(self) -> dict[str, Any]:
        """The server's `/v1/emoe/state`."""
        try:
            response = await self._http.get("/v1/emoe/state")
            return response.raise_for_status().json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ServerFailed(f"{self._http.base_url} has no /v1/emoe/state: {_line(error)}") from None

    async def begin(self) -> None:
        """A server is always ready."""

    async def answer(self, job: Job, began: float) -> Record:
        """Send a job and read its answer; `began` is when the run did, on `clock`."""
        deadlines = {"ttft_ms": job.slo.ttft_ms, "latency_ms": job.slo.latency_ms}
        body = {
            "messages": job.sample.messages,
            "max_completion_tokens": self._max_tokens,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,  # an event may carry several tokens, or one that shows no text yet
            "emoe": {"task": job.task, "slo": deadlines},
        }
        if job.answer_tokens is not None:
            body |= {"max_completion_tokens": job.answer_tokens, "ignore_eos": True}
        times: list[float] = []
        whole = False
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise ServerFailed(_refusal(response.status_code, await response.aread()))
                async for line in response.aiter_lines():
                    whole = whole or line == "data: [DONE]"
                    times += [clock() - began] * _num_tokens(line)
        except httpx.HTTPError as error:
            raise ServerFailed(f"a request failed: {_line(error)}") from None
        if not (whole and times):
            raise ServerFailed("an answer broke off" if times else "an answer had no tokens")
        return Record(job, tuple(times))


@contextlib.asynccontextmanager
async def connected(url: str, max_tokens: int) -> AsyncIterator[Client]:
    """A client with as many connections as it needs."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    try:
        http = httpx.AsyncClient(base_url=url, limits=limits, timeout=TIMEOUT, trust_env=False)
    except httpx.InvalidURL as error:
        raise ServerFailed(f"{url} is no URL: {_line(error)}") from None
    async with http:
        yield Client(http, max_tokens)


async def closed_loop(client: Target, jobs: Sequence[Job], concurrency: int) -> list[Record]:
    """So many users, each of whom asks again when answered, until all jobs are done; arrivals are set accordingly."""
    await client.begin()
    left, records, began = iter(jobs), [], clock()

    async def user() -> None:
        for job in left:
            job = dataclasses.replace(job, arrival=clock() - began)
            records.append(await client.answer(job, began))

    with _one_error():
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(user())
    return records


async def open_loop(client: Target, jobs: Sequence[Job]) -> list[Record]:
    """Every job at its time of arrival, whatever became of those before it; times count from then."""
    await client.begin()
    began = clock()
    with _one_error():
        async with asyncio.TaskGroup() as group:
            tasks = []
            for job in jobs:
                await asyncio.sleep(began + job.arrival - clock())
                tasks.append(group.create_task(client.answer(job, began)))
    return [task.result() for task in tasks]


@contextlib.contextmanager
def _one_error():
    """The first of the errors that ended a group of tasks."""
    try:
        yield
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def _num_tokens(line: str) -> int:
    """Tokens in a line of the stream. Raises `ServerFailed` for an error that the server sent in place of them."""
    if not line.startswith("data: {"):
        return 0
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise ServerFailed(f"an answer broke off: {event['error']['message']}")
    return sum(len(choice.get("token_ids") or ()) for choice in event["choices"])


def _refusal(status: int, content: bytes) -> str:
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = content[:100].decode(errors="replace")
    return f"the server refused a request with {status}: {' '.join(message.split())}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
