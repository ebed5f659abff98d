"""Body of `/v1/responses`: OpenAI's names, as the conversation that it is."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from emoe_jax.errors import RequestError
from serve.bounds import sampling
from serve.responses.input import Id, InputItem, InputItems, conversation
from serve.schema import GIVEN_OR_DEFAULT, CacheSalt, ChatRequest, EmoeRequest, LogitBias, chat_request
from serve.strict import Refused, RefusingModel, StrictModel
from serve.tools import MAX_NAME, MAX_TOOLS, ToolName, check_parameters
from serve.validation import named

MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
LOGPROBS = "message.output_text.logprobs"

EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}
"""Efforts that no chat template knows, and the nearest that some do."""


def _input_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _function(value: Any) -> Any:
    if value != "function":
        raise ValueError(f"is {named(value)}; this server runs no tools itself; expected 'function', which clients run")
    return value


class ResponsesTool(StrictModel):
    """A function of the client's. Tools that OpenAI runs itself are not taken."""

    type: Annotated[Literal["function"], BeforeValidator(_function)]
    name: ToolName
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, BeforeValidator(lambda v: v if v is None else check_parameters(v))] = (
        None
    )
    strict: bool | None = None

    def to_chat(self) -> dict[str, Any]:
        """The tool in the shape of chat completions."""
        return {"type": "function", "function": self.model_dump(exclude={"type"})}


class NamedTool(StrictModel):
    """For OpenAPI: the choice of one function."""

    type: Literal["function"]
    name: str


def _choice(value: Any) -> Any:
    """The choice as chat completions have it."""
    if value in (None, "none", "auto", "required"):
        return value
    if isinstance(value, Mapping) and value.get("type") == "function" and isinstance(value.get("name"), str):
        return {"type": "function", "name": value["name"]}
    found = named(value.get("type")) if isinstance(value, Mapping) else named(value)
    raise ValueError(
        f'is {found}; expected "none", "auto", "required" or {{"type": "function", "name": "..."}}, a function of tools'
    )


Choice = Annotated[
    str | dict[str, str] | None,
    PlainValidator(_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedTool | None),
]


class TextFormat(StrictModel):
    """What the text has to match. `name`, `description` and `strict` change nothing: schemas are always kept to."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "TextFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise RequestError("text.format needs schema for its type json_schema", param="text.format.schema")
        return self

    def to_chat(self) -> dict[str, Any]:
        """The format as `response_format`."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.json_schema}}


class TextConfig(StrictModel):
    """How the text is written."""

    format: TextFormat | None = None


class ReasoningConfig(StrictModel):
    """How much the model shall think, for chat templates that ask. Thoughts are not summed up."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    def to_variables(self) -> dict[str, Any]:
        """Variables of the chat template."""
        if self.effort is None:
            return {}
        if self.effort == "none":
            return {"enable_thinking": False}
        return {"enable_thinking": True, "reasoning_effort": EFFORTS.get(self.effort, self.effort)}


def _metadata(value: Any) -> Any:
    if isinstance(value, Mapping):
        if len(value) > MAX_METADATA:
            raise ValueError(f"has {len(value)} keys; at most {MAX_METADATA} are taken")
        for key, text in value.items():
            if len(key) > MAX_METADATA_KEY or (isinstance(text, str) and len(text) > MAX_METADATA_VALUE):
                raise ValueError(
                    f"has a key or value that is too long; at most {MAX_METADATA_KEY} and {MAX_METADATA_VALUE} "
                    "characters are taken"
                )
    return value


Metadata = Annotated[dict[str, str] | None, BeforeValidator(_metadata)]
Included = Annotated[list[str], Field(max_length=64, fail_fast=True)]


class ResponsesRequest(RefusingModel):
    """Body of `/v1/responses`. The last fields are ours, as in the other routes."""

    refused: ClassVar[Refused] = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "logprobs": (False,),
        "moderation": (),
        "n": (1,),
        "prompt": (),
        "stop": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    model: str | None = None
    input: Annotated[InputItems, BeforeValidator(_input_items, json_schema_input_type=str | list[InputItem])]
    instructions: str | None = None
    previous_response_id: Id | None = None
    tools: Annotated[list[ResponsesTool] | None, Field(max_length=MAX_TOOLS, fail_fast=True)] = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    max_output_tokens: Annotated[int, sampling("max_tokens")] | None = None
    temperature: Annotated[float, sampling("temperature")] | None = None
    top_p: Annotated[float, sampling("top_p")] | None = None
    stream: bool | None = None
    store: bool | None = None
    metadata: Metadata = None
    include: Included | None = None
    top_k: Annotated[int, sampling("top_k")] | None = None
    min_p: Annotated[float, sampling("min_p")] | None = None
    frequency_penalty: Annotated[float, sampling("frequency_penalty")] | None = None
    presence_penalty: Annotated[float, sampling("presence_penalty")] | None = None
    repetition_penalty: Annotated[float, sampling("repetition_penalty")] | None = None
    logit_bias: LogitBias = None
    seed: Annotated[int, sampling("seed")] | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: CacheSalt | None = None
    emoe: EmoeRequest | None = None

    @model_validator(mode="after")
    def _check_together(self) -> "ResponsesRequest":
        if LOGPROBS in (self.include or ()):
            message = f"include of {LOGPROBS} is not supported by this server; /v1/chat/completions has logprobs"
            raise RequestError(message, param="include", code="unsupported_parameter")
        if isinstance(self.tool_choice, dict) and self.tool_choice["name"] not in [t.name for t in self.tools or ()]:
            name = self.tool_choice["name"][:MAX_NAME]
            raise RequestError(f"tool_choice names {name!r}, which is none of the tools", param="tool_choice")
        return self

    def to_chat(self, earlier: Sequence[InputItem] = ()) -> ChatRequest:
        """The same as a body of `/v1/chat/completions`, behind the items of `earlier` responses. Raises
        `RequestError`, which names fields as that route does.
        """
        same = (
            *("model", *GIVEN_OR_DEFAULT, "logit_bias", "seed", "ignore_eos", "stream"),
            *("parallel_tool_calls", "cache_salt", "emoe"),
        )
        fields: dict[str, Any] = {name: getattr(self, name) for name in same}
        fields["messages"] = conversation([*earlier, *self.input], self.instructions, len(earlier))
        fields["max_tokens"] = self.max_output_tokens
        if self.tools:
            fields["tools"] = [tool.to_chat() for tool in self.tools]
        choice = self.tool_choice
        fields["tool_choice"] = (
            {"type": "function", "function": {"name": choice["name"]}} if isinstance(choice, dict) else choice
        )
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = self.text.format.to_chat()
        variables = self.reasoning.to_variables() if self.reasoning is not None else {}
        if variables or self.chat_template_kwargs:
            fields["chat_template_kwargs"] = {**variables, **(self.chat_template_kwargs or {})}
        return chat_request(fields)
