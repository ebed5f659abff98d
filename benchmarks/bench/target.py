"""The server that `emoe bench serve` asks: streamed chat completions, whose failures are counted by kind."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx

from benchmarks.serving.client import TIMEOUT, clock
from benchmarks.serving.report import Record
from benchmarks.serving.server import ServerFailed
from benchmarks.serving.workload import Job

STATE_SECONDS = 5.0
NO_TOKENS, UNAVAILABLE = "no tokens", "HTTP 503 (unavailable)"


def is_failure(kind: str) -> bool:
    """Whether an error of this kind is none of a working server, which refuses requests and may answer with nothing."""
    return kind == UNAVAILABLE or not kind.startswith((NO_TOKENS, "HTTP 4", "HTTP 503"))


class MeasuredServer:
    """A `Target` that never raises for a request: a failure is a `Record` without tokens, and counts in `errors`."""

    def __init__(self, http: httpx.AsyncClient, fields: dict[str, Any], max_concurrency: int | None):
        """`fields` are sent with every request. No more than `max_concurrency` requests are sent at once."""
        self.forget()
        self._http = http
        self._fields = fields
        self._turn = contextlib.nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)

    def forget(self) -> None:
        """Count from now on."""
        self.errors: Counter[str] = Counter()
        self.records: list[Record] = []
        self.prompt_tokens = 0

    async def begin(self) -> None:
        """A server is always ready."""

    async def answer(self, job: Job, began: float) -> Record:
        """Send a job and read its answer; `began` is when the run did, on `clock`. The record is kept, too."""
        self.records.append(await self._answer(job, began))
        return self.records[-1]

    async def _answer(self, job: Job, began: float) -> Record:
        times: list[float] = []
        async with self._turn:
            kind = await self._read(job, began, times)
        if kind is None and not times:
            kind = NO_TOKENS
        if kind is not None:
            self.errors[kind] += 1
            return Record(job, ())
        return Record(job, tuple(times))

    async def state(self) -> dict[str, Any] | None:
        """The server's `/v1/emoe/state`; None where it has none."""
        with contextlib.suppress(httpx.HTTPError, ValueError):
            response = await self._http.get("/v1/emoe/state", timeout=STATE_SECONDS)
            return response.json() if response.status_code == 200 else None
        return None

    async def model(self) -> str:
        """The name of the served model. Raises `ServerFailed`, one line, where no server answers."""
        try:
            response = await self._http.get("/v1/models")
        except httpx.HTTPError as error:
            raise ServerFailed(f"no server answers at {self._http.base_url}: {_line(error)}") from None
        if response.status_code != 200:
            raise ServerFailed(
                f"{self._http.base_url} answers /v1/models with {response.status_code}{_advice(response)}"
            )
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise ServerFailed(f"{self._http.base_url} has no /v1/models as OpenAI's API has") from None

    async def _read(self, job: Job, began: float, times: list[float]) -> str | None:
        """Add a time for each token to `times`; what went wrong, None where nothing did."""
        body = {"messages": list(job.sample.messages), "max_completion_tokens": job.sample.output_tokens}
        whole = False
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body | self._fields) as response:
                if response.status_code != 200:
                    await response.aread()
                    return f"HTTP {response.status_code}{_code(response)}"
                async for line in response.aiter_lines():
                    whole = whole or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            return "error in the stream"
                        self._count(event, clock() - began, times)
        except httpx.TimeoutException:
            return "timeout"
        except httpx.HTTPError as error:
            return "connection refused" if isinstance(error, httpx.ConnectError) else "connection lost"
        except ValueError:
            return "not JSON"
        return None if whole else "stream cut off"

    def _count(self, event: dict[str, Any], now: float, times: list[float]) -> None:
        usage = event.get("usage")
        if usage:
            self.prompt_tokens += usage.get("prompt_tokens", 0)
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids")  # an event may carry several tokens, or one that shows no text yet
            if ids is None:  # of a server that does not know `return_token_ids`
                delta = choice.get("delta") or {}
                ids = [0] if delta.get("content") or delta.get("reasoning_content") else []
            times += [now] * len(ids)


@contextlib.asynccontextmanager
async def connected(
    url: str, api_key: str | None, fields: dict[str, Any], max_concurrency: int | None
) -> AsyncIterator[MeasuredServer]:
    """A client with as many connections as it needs. Raises `ServerFailed` for what is no URL."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        http = httpx.AsyncClient(base_url=url, limits=limits, timeout=TIMEOUT, trust_env=False, headers=headers)
    except httpx.InvalidURL as error:
        raise ServerFailed(f"{url} is no URL: {_line(error)}") from None
    async with http:
        yield MeasuredServer(http, fields, max_concurrency)


def _code(response: httpx.Response) -> str:
    """OpenAI's code or type of an error, in brackets."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        error = response.json()["error"]
        if word := error.get("code") or error.get("type"):
            return f" ({word})"
    return ""


def _advice(response: httpx.Response) -> str:
    return "; give its --api-key" if response.status_code == 401 else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
