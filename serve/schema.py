"""Request bodies. Names, defaults and meaning are OpenAI's, with vLLM's additions; `emoe` is ours."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from emoe_jax.errors import RequestError
from emoe_jax.requests.contract import TOLERANCE, RoutingContract
from emoe_jax.requests.request import (
    BIAS,
    INT32,
    MAX_CACHE_SALT,
    MAX_LOGIT_BIAS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MILLISECONDS,
    SAMPLING_BOUNDS,
    SLO,
    TOKEN_ID,
    SamplingParams,
)
from serve.bounds import sampling, within
from serve.strict import ClosedModel, Refused, RefusingModel, StrictModel
from serve.structured import StructuredRequest
from serve.template import TemplateRequest
from serve.tools import Calls, ToolChoiceRequest
from serve.validation import describe_validation, found

MAX_PROMPTS = 256
MAX_MESSAGES = 4096
DEFAULT_COMPLETION_TOKENS = 16

GIVEN_OR_DEFAULT = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip
"""Sampling parameters that requests and engine call the same."""

TokenId = Annotated[int, within(TOKEN_ID)]
Prompt = str | list[int]
Bias = Annotated[float, within(BIAS)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT)]
TaskName = Annotated[str, Field(min_length=1, max_length=64)]
Milliseconds = Annotated[float, within(MILLISECONDS)]


_SHAPES = "a string, a list of strings, a list of token ids or a list of lists of them"


def _check_token_ids(tokens: list[Any], of: str = "") -> None:
    """`of` names the list where it is one of several."""
    for position, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token <= INT32:
            raise ValueError(f"element {position}{of} is {found(token)}; token ids are integers from 0")


def _prompt_list(value: Any) -> list[Prompt]:
    """Any of OpenAI's four shapes of `prompt` as a list of strings or of token-id lists."""
    if isinstance(value, list) and value and isinstance(value[0], int | float):
        _check_token_ids(value)
        value = [value]
    elif isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value or not isinstance(value[0], str | list):
        raise ValueError(f"is {found(value) if value else 'empty'}; expected {_SHAPES}")
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"has {len(value)} elements; at most {MAX_PROMPTS} prompts are taken")
    for position, prompt in enumerate(value):
        if type(prompt) is not type(value[0]):
            raise ValueError(f"element {position} is {found(prompt)}, but element 0 is {found(value[0])}")
        if isinstance(prompt, list):
            _check_token_ids(prompt, f" of prompt {position}")
        if not prompt:
            raise ValueError("is empty" if len(value) == 1 else f"element {position} is empty")
    return value


def stop_list(value: Any) -> list[str] | None:
    if value is None:
        return None
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or len(strings) > MAX_STOP_STRINGS:
        size = f"has {len(strings)} elements" if isinstance(strings, list) else f"is {found(strings)}"
        raise ValueError(f"{size}; expected a string or a list of at most {MAX_STOP_STRINGS} strings")
    for position, string in enumerate(strings):
        if not isinstance(string, str):
            raise ValueError(f"element {position} is {found(string)}; expected a string")
        if not 0 < len(string) <= MAX_STOP_LENGTH:
            raise ValueError(f"element {position} has {len(string)} characters; expected 1 to {MAX_STOP_LENGTH}")
    return strings


def _by_token_id(value: Any) -> Any:
    """A mapping from token ids, which JSON has to write as strings."""
    if isinstance(value, dict):
        if len(value) > MAX_LOGIT_BIAS:
            raise ValueError(f"has {len(value)} tokens; at most {MAX_LOGIT_BIAS} are taken")
        for token in value:
            if not re.fullmatch("[0-9]{1,9}", token):
                raise ValueError(f"has the key {token[:40]!r}; expected token ids")
    return value


LogitBias = Annotated[dict[str, Bias] | None, BeforeValidator(_by_token_id)]


def _joined_content(value: Any) -> str:
    """A message's content as one string; a list of text parts is joined by newlines, as vLLM does."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"is {found(value)}; expected a string or a list of text parts")
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError('has a part of another form than {"type": "text", "text": "..."}, the only one supported')
    return "\n".join(part["text"] for part in value)


class SloRequest(ClosedModel):
    """Deadlines of one request, milliseconds from its arrival; a `strict` one is refused if they cannot be kept."""

    ttft_ms: Milliseconds | None = None
    latency_ms: Milliseconds | None = None
    strict: bool | None = None


class GatewayHeaders(BaseModel):
    """Deadlines and task as headers, which gateways can read. What the body says wins."""

    model_config = ConfigDict(allow_inf_nan=False)

    x_slo_ttft_ms: Milliseconds | None = None
    x_slo_latency_ms: Milliseconds | None = None
    x_emoe_task: TaskName | None = None

    def to_slo(self, body: SloRequest | None) -> SLO:
        """The deadlines of a request, field by field: the body's, else the header's. Only the body can be `strict`."""
        body = body or SloRequest()
        return SLO(
            ttft_ms=self.x_slo_ttft_ms if body.ttft_ms is None else body.ttft_ms,
            latency_ms=self.x_slo_latency_ms if body.latency_ms is None else body.latency_ms,
            strict=bool(body.strict),
        )


class EmoeRequest(ClosedModel):
    """The request extension: task type, routing contract and its tolerance, deadlines. Unknown fields are refused."""

    task: TaskName | None = None
    routing: RoutingContract | None = None
    tolerance: Annotated[float, within(TOLERANCE)] | None = None
    slo: SloRequest | None = None


class StreamOptions(StrictModel):
    """What a stream says besides its text; only with `stream`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Usage so far in every chunk that has choices, if `include_usage` is set too, as in vLLM."""


class SamplingRequest(RefusingModel, StructuredRequest):
    """What `/v1/completions` and `/v1/chat/completions` have in common."""

    refused: ClassVar[Refused] = {
        "allowed_token_ids": (),
        "bad_words": ([],),
        "best_of": (1,),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "logits_processors": ([],),
        "min_tokens": (0,),
        "priority": (0,),
        "prompt_logprobs": (),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
    }

    model: str | None = None
    temperature: Annotated[float, sampling("temperature")] | None = None
    top_p: Annotated[float, sampling("top_p")] | None = None
    top_k: Annotated[int, sampling("top_k")] | None = None
    min_p: Annotated[float, sampling("min_p")] | None = None
    frequency_penalty: Annotated[float, sampling("frequency_penalty")] | None = None
    presence_penalty: Annotated[float, sampling("presence_penalty")] | None = None
    repetition_penalty: Annotated[float, sampling("repetition_penalty")] | None = None
    logit_bias: LogitBias = None
    seed: Annotated[int, sampling("seed")] | None = None
    n: Annotated[int, sampling("n")] | None = None
    max_tokens: Annotated[int, sampling("max_tokens")] | None = None
    stop: Annotated[list[str] | None, BeforeValidator(stop_list, json_schema_input_type=str | list[str] | None)] = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    cache_salt: CacheSalt | None = None
    emoe: EmoeRequest | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", param="stream_options")
        return self

    def to_params(
        self, max_tokens: int, logprobs: int | None, defaults: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """`defaults` are sampling parameters for what the request leaves open."""
        given = {name: getattr(self, name) for name in GIVEN_OR_DEFAULT}
        given = {name: value for name, value in given.items() if value is not None}
        left_open = {name: value for name, value in (defaults or {}).items() if name in GIVEN_OR_DEFAULT}
        return SamplingParams(
            max_tokens=max_tokens,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            seed=self.seed,
            n=self.n or 1,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            structured_outputs=self.to_structured_outputs(),
            **(left_open | given),
        )


class CompletionRequest(SamplingRequest):
    """Body of `/v1/completions`."""

    refused: ClassVar[Refused] = {**SamplingRequest.refused, "prompt_embeds": (), "suffix": ("",)}

    prompt: Annotated[
        list[str] | list[list[int]],
        PlainValidator(_prompt_list, json_schema_input_type=str | list[TokenId] | list[str] | list[list[TokenId]]),
    ]
    max_tokens: Annotated[int, within(SAMPLING_BOUNDS["max_tokens"][0]._replace(low=0))] | None = None
    """0 computes nothing but the prompt, which `echo` shows."""
    logprobs: Annotated[int, sampling("logprobs")] | None = None
    echo: bool | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_echo(self) -> "CompletionRequest":
        if self.max_tokens == 0 and (self.stream or not self.echo):
            raise RequestError("max_tokens of 0 needs echo to be true and stream to be false", param="max_tokens")
        return self

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of the prompt's own tokens are asked for."""
        return bool(self.echo) and self.logprobs is not None


class TextPart(StrictModel):
    """The one kind of content part that is taken: text."""

    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    """One message. A list of text parts becomes one text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str,
        Field(default=None, validate_default=True),
        BeforeValidator(_joined_content, json_schema_input_type=str | list[TextPart] | None),
    ]
    name: str | None = None
    reasoning_content: str | None = None
    """What an assistant thought, for templates that show it apart from its answer; `reasoning` is the same."""
    reasoning: str | None = None
    tool_calls: Calls | None = None
    """What an assistant has called."""
    tool_call_id: str | None = None
    """Of the call whose result a tool says."""

    @field_validator("content", mode="before")
    @classmethod
    def _require_content(cls, value: Any, info: ValidationInfo) -> Any:
        """Of users, that is: an assistant may have said nothing."""
        if value is None and info.data.get("role") == "user":
            raise PydanticKnownError("missing")
        return value

    @model_validator(mode="before")
    @classmethod
    def _refuse_function_call(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("function_call"):
            raise ValueError("function_call is not supported by this server; tool_calls are")
        return data

    @model_validator(mode="after")
    def _check_caller(self) -> "ChatMessage":
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"has tool_calls, but its role is {self.role}; only an assistant calls tools")
        return self

    def to_template(self) -> dict[str, Any]:
        """The message as a chat template reads it: arguments of calls are objects."""
        return {name: value for name, value in self.model_dump(exclude_none=True).items() if value != []}


class ChatRequest(ToolChoiceRequest, TemplateRequest, SamplingRequest):
    """Body of `/v1/chat/completions`."""

    refused: ClassVar[Refused] = {
        **SamplingRequest.refused,
        "add_special_tokens": (False,),
        "audio": (),
        "chat_template": (),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": ("none",),
        "web_search_options": (),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, sampling("max_tokens")] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, sampling("logprobs")] | None = None

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return self


def chat_request(fields: Mapping[str, Any]) -> ChatRequest:
    """A body of `/v1/chat/completions` that another API's has become. Raises `RequestError` for what that API lets
    through and this one does not.
    """
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        message, param = describe_validation([{**first, "loc": ("body", *first["loc"])}])
        raise RequestError(message, param=param) from None


class TokenizeRequest(TemplateRequest):
    """Body of `/tokenize`: exactly one of `prompt` and `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one_input(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give exactly one of prompt and messages", param="prompt")
        return self


class DetokenizeRequest(StrictModel):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
