"""An engine and a tokenizer that need no model: one token per character, answers that count through the alphabet."""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emoe_jax.engine.vitals import Vitals
from emoe_jax.errors import CheckpointError, RequestError
from emoe_jax.requests.contract import RoutingContract
from emoe_jax.requests.request import SLO, Completion, Delta, RequestOutput, SamplingParams, TokenLogprob
from emoe_jax.requests.text import TextStream

MAX_MODEL_LEN = 100
VOCAB_SIZE = 128
EOS = 0


class FakeTokenizer:
    """Token id = code point. The chat template writes `role:content;` and ends with `assistant:`."""

    shows_tools = True

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [min(ord(character), VOCAB_SIZE - 1) for character in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))

    def chat(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        if messages[0]["role"] == "tool":
            raise RequestError("conversations start with the user", param="messages")
        if messages[0]["content"] == "break the template":
            raise CheckpointError("the model's chat template failed on the messages: division by zero")
        text = "".join(f"{message['role']}:{message['content']};" for message in messages)
        text = text.removesuffix(";") if continue_final_message else text + "assistant:" * add_generation_prompt
        text = "".join(f"{tool['function']['name']}();" for tool in tools or ()) + text
        text = "".join(f"{name}={value};" for name, value in (kwargs or {}).items()) + text
        return self.encode(text, add_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int, opening: bool = False) -> bytes:
        return chr(token_id).encode()

    def begins_text(self, prompt: Sequence[int]) -> bool:
        return False

    def special_id(self, token: str) -> int | None:
        return None

    def add(self, token_id: int) -> str:
        return chr(token_id)

    def flush(self) -> str:
        return ""


@dataclasses.dataclass
class Running:
    output: RequestOutput
    params: SamplingParams
    streams: list[TextStream]


class FakeEngine:
    """The n-th token of every answer is the n-th letter; `params.seed` shifts the alphabet. Every answer waits for a
    quarter of a second, by its own account, and first tokens within less than a millisecond are given up.
    """

    def __init__(self, tokenizer: FakeTokenizer | None = None, step_seconds: float = 0.0):
        self.tokenizer = tokenizer
        self.step_seconds = step_seconds
        self.running: dict[str, Running] = {}
        self.requests: list[dict[str, Any]] = []
        self.arrivals: list[float | None] = []
        self.failures: list[Exception] = []
        self.failing_ids: set[str] = set()
        self.gate = threading.Event()
        """Cleared: steps make no progress."""
        self.gate.set()
        self.released = threading.Event()
        """Cleared: a step does not end."""
        self.released.set()
        self.vitals = Vitals(0.0, (), compiling=False)

    def add_request(
        self,
        request_id: str,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        task: str | None = None,
        routing: RoutingContract | None = None,
        tolerance: float | None = None,
        slo: SLO | None = None,
        arrival: float | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        assert isinstance(prompt, list)
        if any(token >= VOCAB_SIZE for token in prompt):
            raise RequestError("token id outside the vocabulary", param="prompt")
        completions = [Completion(index, logprobs=None if params.logprobs is None else []) for index in range(params.n)]
        output = RequestOutput(request_id, prompt, completions, task or "conv", routing or "resident", tolerance, 0.25)
        output.substituted_weight = 0.125
        output.num_cached_tokens = 1
        output.slo_unattainable = slo is not None and (slo.ttft_ms or 1) < 1
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [TokenLogprob(token, -2.0, ((ord("A"), -1.0),)) for token in prompt[1:]]
        streams = [TextStream(self.tokenizer, params.stop) for _ in range(params.n)]
        self.running[request_id] = Running(output, params, streams)
        self.requests.append(
            {
                "prompt": prompt,
                "params": params,
                "task": task,
                "routing": routing,
                "slo": slo,
                "cache_salt": cache_salt,
            }
        )
        self.arrivals.append(arrival)
        return prompt

    def has_work(self) -> bool:
        return any(not running.output.finished for running in self.running.values())

    def on_staged(self, call: Callable[[], None]) -> None:
        """Nothing is ever staged."""

    def step(self) -> list[Delta]:
        self.released.wait()
        time.sleep(self.step_seconds)
        if not self.gate.wait(0.005):
            return []
        if self.failures:
            for request_id in self.failing_ids & self.running.keys():
                self.running[request_id].output.completions[0].finish_reason = "error"
            raise self.failures.pop()
        deltas = []
        for running in self.running.values():
            for completion, stream in zip(running.output.completions, running.streams, strict=True):
                if completion.finish_reason is None:
                    deltas.append(self._advance(running, completion, stream))
        return deltas

    def _advance(self, running: Running, completion: Completion, stream: TextStream) -> Delta:
        token = ord("a") + (len(completion.token_ids) + (running.params.seed or 0)) % 26
        completion.token_ids.append(token)
        completion.queue_seconds = 0.25
        text, stopped = stream.add(token)
        if stopped:
            completion.finish_reason = "stop"
        elif len(completion.token_ids) == running.params.max_tokens:
            completion.finish_reason = "length"
            text += stream.flush()
        completion.text += text
        logprobs: tuple[TokenLogprob, ...] = ()
        if completion.logprobs is not None:
            top = tuple((ord("A") + rank, -1.0 - rank) for rank in range(running.params.logprobs or 0))
            logprobs = (TokenLogprob(token, -0.5 if top else float("-inf"), top),)
            completion.logprobs.extend(logprobs)
        prompt_logprobs = tuple(running.output.prompt_logprobs or ()) if len(completion.token_ids) == 1 else ()
        return Delta(
            running.output.request_id,
            completion.index,
            text,
            (token,),
            logprobs,
            completion.finish_reason,
            prompt_logprobs,
        )

    def output(self, request_id: str) -> RequestOutput:
        return self.running[request_id].output

    def pop(self, request_id: str) -> RequestOutput:
        return self.running.pop(request_id).output

    def state(self) -> dict[str, Any]:
        return {"model": "fake", "residency": {"experts": [[0, 1]]}, "running": len(self.running)}
