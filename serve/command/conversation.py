"""A conversation with a server over its HTTP API: what was said, and each answer piece by piece, timed from here."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Generator
from typing import Any, Literal, NamedTuple

import httpx

from emoe_jax.errors import ConfigError, EmoeError
from serve.command.served_state import between

TIMEOUT = httpx.Timeout(300.0, connect=5.0)


class ChatFailed(EmoeError):
    """No server answers, or it refused the request, or broke its answer off."""


class Piece(NamedTuple):
    """Some text of an answer."""

    kind: Literal["reasoning", "content"]
    text: str


@dataclasses.dataclass
class Answer:
    """An answer as far as it came. Times are in milliseconds, None where there were too few tokens."""

    content: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    """As of the server; `stopped` where the reader stopped it."""
    tokens: int = 0
    prompt_tokens: int | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    emoe: dict[str, Any] | None = None
    """Task, contract and substitutions, as the answer reports them; None of another server."""
    server: dict[str, Any] | None = None
    """What the server did meanwhile, for all its requests; None of another server."""

    def account(self) -> str:
        """One line: tokens, times, hits, loads, coverage, contract, substituted weight."""
        parts = [f"{self.tokens} tokens"]
        parts += [f"TTFT {self.ttft_ms:.0f} ms"] if self.ttft_ms is not None else []
        parts += [f"TPOT {self.tpot_ms:.1f} ms"] if self.tpot_ms is not None else []
        if self.server is not None:
            covered = "-" if self.server["coverage"] is None else f"{self.server['coverage']:.1%}"
            parts += [f"hits {self.server['hits']:,} of {self.server['wishes']:,} (coverage {covered})"]
            parts += [f"{self.server['loads']:,} loads"]
        if self.emoe is not None:
            tolerance = f" {self.emoe['tolerance']:g}" if self.emoe.get("tolerance") is not None else ""
            parts += [f"{self.emoe['routing']}{tolerance}"]
            parts += [f"substituted weight {self.emoe['substituted_weight']:.2%}"]
            parts += [f"task {self.emoe['task']}"] if self.emoe.get("task") else []
        parts += [self.finish_reason] if self.finish_reason not in (None, "stop") else []
        return " · ".join(parts)


@dataclasses.dataclass
class Asking:
    """What goes with every question."""

    model: str = ""
    system: str | None = None
    task: str | None = None
    routing: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    tasks: list[str] | None = None
    """Those that the server knows; None where it takes any."""

    def check_task(self, task: str, name: str = "task") -> str:
        """The task. Raises `ConfigError`, with the name of what was given, for one that the server does not know."""
        if self.tasks is not None and task not in self.tasks:
            raise ConfigError(f"{name} is {task[:64]!r}; expected one of {', '.join(self.tasks)}")
        return task


class Conversation:
    """Messages so far, and the server that answers them."""

    def __init__(self, http: httpx.Client, asking: Asking):
        self.asking = asking
        self.messages: list[dict[str, str]] = []
        self.answer = Answer()
        """The newest one. It grows while `ask` is read."""
        self._http = http

    def state(self) -> dict[str, Any] | None:
        """The server's `/v1/emoe/state`; None where it has none. May be called from another thread."""
        with contextlib.suppress(httpx.HTTPError, ValueError):
            response = self._http.get("/v1/emoe/state", timeout=5.0)
            return response.json() if response.status_code == 200 else None
        return None

    def ask(self, text: str) -> Generator[Piece]:
        """The answer to a message, piece by piece. Whoever stops reading closes the iterator, which aborts the answer.

        What was asked and what came of the answer is part of the conversation then, if anything came. Raises
        `ChatFailed`, after which the conversation is as it was.
        """
        asked = {"role": "user", "content": text}
        self.answer = Answer(finish_reason="stopped")
        before, began = self.state(), time.perf_counter()
        times: list[float] = []
        failed = False
        try:
            yield from self._pieces(asked, began, times)
        except (ChatFailed, httpx.HTTPError) as error:
            failed = True
            if isinstance(error, ChatFailed):
                raise
            raise ChatFailed(f"the server does not answer: {_line(error)}") from None
        finally:
            self._finish(times, before)
            if times and not failed:
                self.messages += [asked, {"role": "assistant", "content": self.answer.content}]

    def _finish(self, times: list[float], before: dict[str, Any] | None) -> None:
        answer = self.answer
        if times:
            answer.ttft_ms = 1e3 * times[0]
        if len(times) > 1 and answer.tokens > 1:
            answer.tpot_ms = 1e3 * (times[-1] - times[0]) / (answer.tokens - 1)
        answer.server = between(before, self.state())

    def _pieces(self, asked: dict[str, str], began: float, times: list[float]) -> Generator[Piece]:
        with self._http.stream("POST", "/v1/chat/completions", json=self._body(asked)) as response:
            if response.status_code != 200:
                response.read()
                raise ChatFailed(_refusal(response))
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise ChatFailed(f"the answer broke off: {event['error'].get('message', 'no reason was given')}")
                yield from self._read(event, time.perf_counter() - began, times)

    def _read(self, event: dict[str, Any], now: float, times: list[float]) -> Generator[Piece]:
        answer = self.answer
        if usage := event.get("usage"):
            answer.prompt_tokens, answer.tokens = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
        answer.emoe = event.get("emoe") or answer.emoe
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            reasoning, content = delta.get("reasoning_content") or "", delta.get("content") or ""
            if reasoning or content or choice.get("token_ids"):
                times.append(now)
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            answer.reasoning += reasoning
            answer.content += content
            if reasoning:
                yield Piece("reasoning", reasoning)
            if content:
                yield Piece("content", content)

    def _body(self, asked: dict[str, str]) -> dict[str, Any]:
        asking = self.asking
        system = [] if asking.system is None else [{"role": "system", "content": asking.system}]
        emoe = {"task": asking.task, "routing": asking.routing}
        body: dict[str, Any] = {
            "model": asking.model,
            "messages": [*system, *self.messages, asked],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "max_completion_tokens": asking.max_tokens,
            "temperature": asking.temperature,
            "emoe": {name: value for name, value in emoe.items() if value is not None} or None,
        }
        return {name: value for name, value in body.items() if value is not None}


def _refusal(response: httpx.Response) -> str:
    message = response.text[:200]
    with contextlib.suppress(ValueError, KeyError, TypeError):
        message = str(response.json()["error"]["message"])
    return " ".join(message.split()) or f"the server answers with {response.status_code}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
