"""The requests of callers and the outputs that they get back. No tensor library here."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from emoe_jax.errors import RequestError
from emoe_jax.option_fields import Bounds, option, options_of, shown
from emoe_jax.requests.contract import RoutingContract
from emoe_jax.requests.parameters import Parameters
from emoe_jax.requests.structured_params import StructuredOutputsParams

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
MAX_N = 64
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_CACHE_SALT = 256
"""Characters of a request's `cache_salt`."""
RESERVED_VARIABLES = ("messages", "chat_template", "tokenize", "continue_final_message")
"""Variables of a chat template that `chat_template_kwargs` cannot set."""
MAX_LOGIT_BIAS = 1024
"""Tokens of one request that `logit_bias` may name."""


INT32, INT64 = 2**31 - 1, 2**63 - 1
TOKEN_ID = Bounds(0, INT32)
BIAS = Bounds(-100, 100)
MILLISECONDS = Bounds(0, 1e9, open_low=True)


def check_number(name: str, value: object, bounds: Bounds) -> None:
    """Raise `RequestError` for what is no number within the bounds."""
    if not isinstance(value, int | float) or isinstance(value, bool) or bounds.missed_by(value) is not None:
        raise RequestError(f"{name} is {shown(value)}; expected a number in {bounds.interval}", param=name)


def _check_integer(name: str, value: object, bounds: Bounds) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or bounds.missed_by(value) is not None:
        raise RequestError(f"{name} is {shown(value)}; expected an integer in {bounds.interval}", param=name)


def check_cache_salt(salt: object) -> None:
    """Raise `RequestError` for what is neither None nor a text of 1 to `MAX_CACHE_SALT` characters."""
    if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= MAX_CACHE_SALT):
        found = f"a text of {len(salt)} characters" if isinstance(salt, str) else type(salt).__name__
        raise RequestError(f"cache_salt is {found}; expected a text of 1 to {MAX_CACHE_SALT}", param="cache_salt")


@dataclasses.dataclass(frozen=True)
class SLO(Parameters):
    """Service-level objective of one request, milliseconds from arrival; None leaves it open.

    A `strict` one is refused when it cannot be kept; others are then served when no other deadline suffers from that.
    """

    ttft_ms: float | None = None
    latency_ms: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.strict, bool):
            raise RequestError(f"slo.strict is {self.strict!r}; expected true or false", param="slo")
        for name in ("ttft_ms", "latency_ms"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, MILLISECONDS)


@dataclasses.dataclass(frozen=True)
class SamplingParams(Parameters):
    """How to choose tokens. Names, defaults and meaning are vLLM's; `temperature=0` is greedy, as is `top_p=0`.

    Raises `RequestError` naming the field for anything out of range.
    """

    max_tokens: int = option(16, "tokens of the answer, at most", low=1, high=INT32)
    temperature: float = option(1.0, "what logits are divided by before a token is drawn; 0 is greedy", low=0, high=100)
    top_p: float = option(1.0, "the likeliest tokens with this probability together are drawn from", low=0, high=1)
    top_k: int = option(0, "so many of the likeliest tokens are drawn from; 0 and -1 are all", low=-1, high=INT32)
    min_p: float = option(0.0, "least probability of a token, as a share of the likeliest one's", low=0, high=1)
    frequency_penalty: float = option(0.0, "taken off a token's logit each time the answer has it", low=-2, high=2)
    presence_penalty: float = option(0.0, "taken off the logit of each token that the answer has", low=-2, high=2)
    repetition_penalty: float = option(
        1.0, "what logits of tokens of prompt and answer are divided by", low=0, high=100, open_low=True
    )
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = option(None, "of the draws", low=-1 - INT64, high=INT64)
    n: int = option(1, "answers to the prompt", low=1, high=MAX_N)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = option(None, "most probable tokens told of each of the answer's", low=0, high=MAX_LOGPROBS)
    prompt_logprobs: int | None = option(None, "the same of the prompt's tokens", low=0, high=MAX_LOGPROBS)
    structured_outputs: StructuredOutputsParams | None = None
    """What answers have to match; one that ends by `max_tokens` or `stop` may be cut before it does."""
    shown_token_ids: tuple[int, ...] = ()
    """Special tokens that the answer's text has by name; others have no text. A parser of answers looks for them."""
    ending_token_ids: tuple[int, ...] = ()
    """Tokens with which the model ends its answers besides its own: a form of answers has them, not a caller. They stop
    like `stop_token_ids`, and do not count against their limit."""
    forced_token_ids: tuple[int, ...] = ()
    """The answer, given: each step decodes one of these tokens, whatever the model would choose, and `logprobs` say how
    probable each was. `max_tokens` becomes their number, and a token that ends texts does not end this one."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "shown_token_ids", tuple(self.shown_token_ids))
        object.__setattr__(self, "ending_token_ids", tuple(self.ending_token_ids))
        object.__setattr__(self, "forced_token_ids", tuple(self.forced_token_ids))
        if self.forced_token_ids:
            object.__setattr__(self, "max_tokens", len(self.forced_token_ids))
            object.__setattr__(self, "ignore_eos", True)
        for name, (bounds, kind) in SAMPLING_BOUNDS.items():
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                (_check_integer if kind is int else check_number)(name, value, bounds)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(f"logit_bias has {len(self.logit_bias)} tokens; at most {MAX_LOGIT_BIAS}", "logit_bias")
        for token, bias in self.logit_bias.items():
            _check_integer("logit_bias", token, TOKEN_ID)
            check_number("logit_bias", bias, BIAS)
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise RequestError("structured_outputs must be StructuredOutputsParams", param="structured_outputs")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed", "stop")
        for string in self.stop:
            if not isinstance(string, str) or not 0 < len(string) <= MAX_STOP_LENGTH:
                raise RequestError(f"stop strings must have 1 to {MAX_STOP_LENGTH} characters", param="stop")
        if len(self.stop_token_ids) > MAX_STOP_STRINGS:
            message = f"stop_token_ids has {len(self.stop_token_ids)} ids; at most {MAX_STOP_STRINGS}"
            raise RequestError(message, param="stop_token_ids")
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids", token, TOKEN_ID)
        for name in ("shown_token_ids", "ending_token_ids", "forced_token_ids"):
            for token in getattr(self, name):
                _check_integer(name, token, TOKEN_ID)
        if self.forced_token_ids:
            for name in ("stop", "stop_token_ids", "ending_token_ids", "structured_outputs"):
                if getattr(self, name):
                    message = f"forced_token_ids say the whole answer; {name} would end or change it"
                    raise RequestError(message, param="forced_token_ids")

    def stops_at(self, token: int) -> bool:
        """Whether this token ends the answer, whatever the model's own end of a text is."""
        return token in self.stop_token_ids or token in self.ending_token_ids

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is not drawn: the most probable one, or a forced one."""
        return self.temperature == 0 or self.top_p == 0 or bool(self.forced_token_ids)

    @property
    def adjusts_logits(self) -> bool:
        """Whether penalties or biases change what the model says."""
        penalties = (self.frequency_penalty, self.presence_penalty, self.repetition_penalty - 1)
        return any(penalties) or bool(self.logit_bias)


SAMPLING_BOUNDS = {
    one.name: (one.traits.bounds, float if float in one.members else int)
    for one in options_of(SamplingParams)
    if one.traits.bounds != Bounds()
}
"""The numbers that fields of `SamplingParams` may be, and whether these are integers. The HTTP server takes them."""

_MAY_BE_NONE = [one.name for one in options_of(SamplingParams) if type(None) in one.members]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of a token under the raw distribution, and of the best alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one engine step added to one completion of a request. `text` may be empty (held back for a stop string)."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens but the first; with a completion's first delta, when they were asked for."""
    error: str | None = None
    """With the finish reason `error`: what went wrong, where the model's own numbers did. Then there is no token."""


@dataclasses.dataclass
class Completion:
    """One of the `n` answers to a request."""

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    """Which of the request's stop strings ended it, if one did. The text does not have it."""
    error: str | None = None
    """What went wrong, where the answer ended because the model's own numbers did."""
    queue_seconds: float | None = None
    """From arrival until its first step was planned; None before its first token."""


@dataclasses.dataclass
class RequestOutput:
    """A finished (or running) request. `text`, `token_ids`, `logprobs` are those of the first completion."""

    request_id: str
    prompt_token_ids: list[int]
    completions: list[Completion]
    task: str | None
    routing: RoutingContract
    tolerance: float | None = None
    """Under `bounded`: the share of a token's weight below which absent experts could be left out."""
    substituted: float = 0.0
    """Share of expert assignments (prompt and answer, without cached tokens) where another expert stood in; 0.0 under
    `exact`."""

    substituted_weight: float = 0.0
    """The same by router weight: of the weights of a token's chosen experts in a layer, the share that others got."""
    slo_unattainable: bool = False
    """Whether deadlines were given up while the request waited."""
    num_cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were there from an earlier request."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """Of the prompt's tokens but the first, which nothing precedes; None when they were not asked for."""

    @property
    def text(self) -> str:
        """The text of the first completion so far."""
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first completion's tokens so far, the one that ended it included. The live list: do not change it."""
        return self.completions[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """One entry for each token of the first completion; None where the request did not ask for them."""
        return self.completions[0].logprobs

    @property
    def finished(self) -> bool:
        """Whether every completion has a finish reason, `error` and `abort` included."""
        return all(completion.finish_reason is not None for completion in self.completions)
