"""A clock that only work and sleep advance, and engines whose steps take a known time on it."""

import dataclasses
from collections import deque
from typing import Any

import numpy as np

from emoe_jax.requests.request import Completion, Delta, RequestOutput, SamplingParams


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    process_time = monotonic = thread_time = perf_counter

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclasses.dataclass
class _Config:
    vocab_size: int = 50


class AheadEngine:
    """A device that computes steps one after the other, and a host that keeps one in flight when it runs `ahead`.

    A step takes `prefill` seconds of the device for each prompt that it reads, at most `prompts_per_step` of them, or
    `decode` seconds; the host takes `host` seconds to prepare it, and as many to book it.
    """

    config = _Config()
    tokenizer = None

    def __init__(
        self,
        clock: Clock,
        decode: float,
        *,
        ahead: bool = True,
        prefill: float = 0.5,
        host: float = 0.0,
        prompts_per_step: int = 64,
    ):
        self._clock, self._decode, self._ahead, self._prefill, self._host = clock, decode, ahead, prefill, host
        self._prompts_per_step = prompts_per_step
        self._outputs: dict[str, tuple[RequestOutput, int]] = {}
        self._planned: dict[str, int] = {}
        self._in_flight: deque[tuple[float, list[str]]] = deque()
        self._device_free = 0.0
        self.finishing = 0.0
        """Seconds that `stop_recording` takes."""
        self._recording = False

    def add_request(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        output = RequestOutput(request_id, prompt, [Completion(0)], None, "resident")
        self._outputs[request_id] = output, params.max_tokens
        self._planned[request_id] = 0

    def has_work(self) -> bool:
        return any(not output.finished for output, _ in self._outputs.values())

    def step(self) -> list[Delta]:
        if not self._in_flight:
            self._dispatch()
        if self._ahead and self._in_flight:
            self._dispatch()
        return self._collect() if self._in_flight else []

    def _dispatch(self) -> None:
        waiting = [name for name, tokens in self._planned.items() if tokens == 0][: self._prompts_per_step]
        decoding = [name for name, tokens in self._planned.items() if 0 < tokens < self._outputs[name][1]]
        if not (waiting or decoding):
            return
        self._clock.now += self._host
        seconds = len(waiting) * self._prefill + (self._decode if decoding else 0.0)
        self._device_free = max(self._device_free, self._clock.now) + seconds
        self._in_flight.append((self._device_free, decoding + waiting))
        for name in decoding + waiting:
            self._planned[name] += 1

    def _collect(self) -> list[Delta]:
        ended, names = self._in_flight.popleft()
        self._clock.now = max(self._clock.now, ended) + self._host
        deltas = []
        for name in names:
            if name not in self._outputs:
                continue
            output, max_tokens = self._outputs[name]
            (completion,) = output.completions
            completion.token_ids.append(3)
            if len(completion.token_ids) == max_tokens:
                completion.finish_reason = "length"
            deltas.append(Delta(name, 0, "", (3,), (), completion.finish_reason))
        return deltas

    def output(self, request_id: str) -> RequestOutput:
        return self._outputs[request_id][0]

    def pop(self, request_id: str) -> RequestOutput:
        self._planned.pop(request_id)
        return self._outputs.pop(request_id)[0]

    @property
    def busy(self) -> bool:
        """Whether the device would still compute if the host waited no longer."""
        return self._device_free > self._clock.now or bool(self._in_flight)

    def record_traces(self, path: Any) -> None:
        self._recording = True

    def stop_recording(self) -> None:
        self._clock.now += self.finishing * self._recording
        self._recording = False

    def state(self) -> dict[str, Any]:
        return {}


class LibraryInStep:
    """Another library: each call returns when its step has been computed."""

    def __init__(self, clock: Clock, decode: float):
        self._clock, self._decode_seconds = clock, decode
        self.generated: list[list[int]] = []

    def use(self, attention: str, experts: str) -> None:
        self.setting = attention, experts

    def start(self, prompts: np.ndarray) -> None:
        self.generated = [[] for _ in prompts]
        self.decode()

    def decode(self) -> None:
        self._clock.now += self._decode_seconds
        for row in self.generated:
            row.append(3)

    def tokens(self) -> list[list[int]]:
        return self.generated

    def stop(self) -> None:
        pass

    def prefill(self, prompt: np.ndarray) -> int:
        self.start(prompt[None])
        return 3
