"""Bodies of `/v1/messages`: Anthropic's names, as the conversation that they are."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from emoe_jax.errors import RequestError
from serve.bounds import sampling
from serve.schema import MAX_MESSAGES, CacheSalt, ChatRequest, EmoeRequest, chat_request, stop_list
from serve.strict import StrictModel
from serve.tools import MAX_TOOLS, ToolName, check_parameters
from serve.validation import found

MAX_BLOCKS = 4096
"""Of one message."""

_NEEDED = {
    "text": ("text",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}
"""The kinds of blocks that are taken, and what each has to have."""


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class TextBlock(StrictModel):
    """A piece of text."""

    type: Literal["text"]
    text: str


TextBlocks = Annotated[
    list[TextBlock],
    Field(max_length=MAX_BLOCKS, fail_fast=True),
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]),
]


class ContentBlock(StrictModel):
    """A piece of a message. Which fields it needs follows from its type; images and documents are not taken."""

    type: Literal["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: TextBlocks | None = None
    is_error: bool | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> "ContentBlock":
        missing = [name for name in _NEEDED[self.type] if getattr(self, name) is None]
        if missing:
            raise ValueError(f"is a {self.type} block without {' and '.join(missing)}")
        return self


class Message(StrictModel):
    """One turn. A text stands for one block of text."""

    role: Literal["user", "assistant"]
    content: Annotated[
        list[ContentBlock],
        Field(min_length=1, max_length=MAX_BLOCKS, fail_fast=True),
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[ContentBlock]),
    ]

    @model_validator(mode="after")
    def _check_blocks(self) -> "Message":
        others = ("tool_result",) if self.role == "assistant" else ("tool_use", "thinking", "redacted_thinking")
        wrong = [block.type for block in self.content if block.type in others]
        if wrong:
            raise ValueError(f"has a {wrong[0]} block, but its role is {self.role}")
        return self


class MessagesTool(StrictModel):
    """A tool of the client's. Those that Anthropic runs itself are not taken."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: Annotated[dict[str, Any], BeforeValidator(check_parameters)]
    strict: bool | None = None

    def to_chat(self) -> dict[str, Any]:
        """The tool in OpenAI's shape."""
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": {**function, "strict": self.strict}}


class MessagesToolChoice(StrictModel):
    """Which tools an answer may call, or has to."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def to_chat(self) -> dict[str, Any]:
        """The choice in OpenAI's fields."""
        named = {"type": "function", "function": {"name": self.name}}
        choice = named if self.type == "tool" else {"any": "required"}.get(self.type, self.type)
        return {"tool_choice": choice, "parallel_tool_calls": not self.disable_parallel_tool_use}


class Thinking(StrictModel):
    """Whether the model shall think, for chat templates that ask. A budget is not kept."""

    type: Literal["enabled", "disabled", "adaptive"]


def _distinct(tools: list[MessagesTool] | None) -> list[MessagesTool] | None:
    names = [tool.name for tool in tools or ()]
    twice = [name for position, name in enumerate(names) if name in names[:position]]
    if twice:
        raise ValueError(f"has two tools of the name {twice[0]!r}")
    return tools


class CountRequest(StrictModel):
    """Body of `/v1/messages/count_tokens`, and what `/v1/messages` has in common with it."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: TextBlocks | None = None
    tools: Annotated[
        list[MessagesTool] | None, Field(max_length=MAX_TOOLS, fail_fast=True), AfterValidator(_distinct)
    ] = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None

    @model_validator(mode="after")
    def _check_choice(self) -> "CountRequest":
        choice, names = self.tool_choice, [tool.name for tool in self.tools or ()]
        if choice is None:
            return self
        if choice.type in ("any", "tool") and not names:
            raise RequestError("tool_choice asks for a call, but there are no tools", param="tool_choice")
        if choice.type == "tool" and choice.name not in names:
            shown = "no name" if choice.name is None else repr(choice.name[:64])
            raise RequestError(f"tool_choice has {shown}; expected the name of a tool", param="tool_choice.name")
        return self

    def to_chat(self) -> ChatRequest:
        """The same as a body of `/v1/chat/completions`. Raises `RequestError`."""
        fields: dict[str, Any] = {"model": self.model, "messages": self._conversation(), **self._settings()}
        if self.tools:
            fields["tools"] = [tool.to_chat() for tool in self.tools]
        if self.tool_choice is not None:
            fields |= self.tool_choice.to_chat()
        if self.thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": self.thinking.type != "disabled"}
        last = self.messages[-1]
        if last.role == "assistant" and not any(block.type == "tool_use" for block in last.content):
            fields["continue_final_message"] = True
        return chat_request(fields)

    def _settings(self) -> Mapping[str, Any]:
        return {}

    def _conversation(self) -> list[dict[str, Any]]:
        names = {
            block.id: block.name for message in self.messages for block in message.content if block.type == "tool_use"
        }
        turns: list[dict[str, Any]] = []
        if self.system:
            turns.append({"role": "system", "content": "\n".join(block.text for block in self.system)})
        for message in self.messages:
            if message.role == "assistant":
                turns.append(_assistant(message))
                continue
            texts: list[str] = []
            for block in message.content:
                if block.type == "text":
                    texts.append(block.text or "")
                    continue
                turns += _user(texts)
                texts = []
                turns.append(_result(block, names.get(block.tool_use_id)))
            turns += _user(texts)
        return turns


def _user(texts: list[str]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "\n".join(texts)}] if texts else []


def _result(block: ContentBlock, name: str | None) -> dict[str, Any]:
    """What a tool said, as a message of its own."""
    said = "\n".join(part.text for part in block.content or ())
    return {"role": "tool", "tool_call_id": block.tool_use_id, "name": name, "content": said}


def _assistant(message: Message) -> dict[str, Any]:
    parts: dict[str, list[ContentBlock]] = {}
    for block in message.content:
        parts.setdefault(block.type, []).append(block)
    turn: dict[str, Any] = {
        "role": "assistant",
        "content": "\n".join(block.text or "" for block in parts.get("text", ())),
    }
    if thoughts := parts.get("thinking"):
        turn["reasoning_content"] = "\n".join(block.thinking or "" for block in thoughts)
    if calls := parts.get("tool_use"):
        turn["tool_calls"] = [
            {"id": block.id, "function": {"name": block.name, "arguments": json.dumps(block.input)}} for block in calls
        ]
    return turn


class MessagesRequest(CountRequest):
    """Body of `/v1/messages`. `emoe` and `cache_salt` are ours, as in the other routes."""

    max_tokens: Annotated[int, sampling("max_tokens")]
    temperature: Annotated[float, sampling("temperature")] | None = None
    top_p: Annotated[float, sampling("top_p")] | None = None
    top_k: Annotated[int, sampling("top_k")] | None = None
    stop_sequences: Annotated[list[str] | None, BeforeValidator(stop_list, json_schema_input_type=list[str] | None)] = (
        None
    )
    stream: bool | None = None
    cache_salt: CacheSalt | None = None
    emoe: EmoeRequest | None = None

    @field_validator("stop_sequences", mode="before")
    @classmethod
    def _check_list(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, list):
            raise ValueError(f"is {found(value)}; expected a list of strings")
        return value

    def _settings(self) -> Mapping[str, Any]:
        same = ("max_tokens", "temperature", "top_p", "top_k", "stream", "cache_salt")
        return {name: getattr(self, name) for name in same} | {"stop": self.stop_sequences or None, "emoe": self.emoe}
