"""Items of `/v1/responses`: what clients and earlier answers put into a conversation, as the messages of a chat."""

import uuid
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from emoe_jax.errors import RequestError
from serve.reader import as_object
from serve.schema import MAX_MESSAGES
from serve.strict import StrictModel

MAX_PARTS = 4096
"""Of one item."""
MAX_ID = 256
"""Characters."""

_NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}
"""The kinds of items that are taken, and what each has to have."""
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


class InputPart(StrictModel):
    """A piece of text. Images, files and sound are not taken."""

    type: Literal["input_text", "output_text", "refusal", "reasoning_text", "summary_text", "text"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _check_text(self) -> "InputPart":
        needed = "refusal" if self.type == "refusal" else "text"
        if getattr(self, needed) is None:
            raise ValueError(f"is a part of the type {self.type} without {needed}")
        return self

    @property
    def said(self) -> str:
        """What it says."""
        return (self.refusal if self.type == "refusal" else self.text) or ""


Parts = Annotated[
    list[InputPart],
    Field(max_length=MAX_PARTS, fail_fast=True),
    BeforeValidator(_as_parts, json_schema_input_type=str | list[InputPart]),
]
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID)]


class InputItem(StrictModel):
    """A message, a call of a tool, its result, or thoughts. Which fields it needs follows from its type."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: Id | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Parts | None = None
    call_id: Id | None = None
    name: str | None = None
    arguments: str | None = None
    output: Parts | None = None
    summary: Parts | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> "InputItem":
        missing = [name for name in _NEEDED[self.type] if getattr(self, name) is None]
        if missing:
            raise ValueError(f"is a {self.type} item without {' and '.join(missing)}")
        return self

    def to_answer(self) -> dict[str, Any]:
        """The item as `/v1/responses/{id}/input_items` lists it."""
        status = {} if self.type == "reasoning" else {"status": "completed"}
        item: dict[str, Any] = {"type": self.type, "id": self.id, **status}
        if self.type == "function_call":
            return {**item, "call_id": self.call_id, "name": self.name, "arguments": self.arguments}
        if self.type == "function_call_output":
            return {**item, "call_id": self.call_id, "output": text_of(self.output)}
        parts = [part.model_dump(exclude_none=True) for part in self.content or ()]
        if self.type == "reasoning":
            return {**item, "summary": [{"type": "summary_text", "text": p.said} for p in self.summary or ()]} | (
                {"content": [{**part, "type": "reasoning_text"} for part in parts]} if parts else {}
            )
        if self.role == "assistant":
            parts = [{"type": "output_text", "text": p.said, "annotations": []} for p in self.content or ()]
        return {**item, "role": self.role, "content": parts}


InputItems = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
ITEMS = TypeAdapter(list[InputItem])


def text_of(parts: Sequence[InputPart] | None) -> str:
    """What they say together, as a chat joins the parts of a message."""
    return "\n".join(part.said for part in parts or ())


def with_ids(items: Iterable[InputItem]) -> list[InputItem]:
    """The items, each with an id."""
    return [
        item if item.id is not None else item.model_copy(update={"id": f"{_PREFIXES[item.type]}_{uuid.uuid4().hex}"})
        for item in items
    ]


def conversation(items: Sequence[InputItem], instructions: str | None, before: int = 0) -> list[dict[str, Any]]:
    """The messages that the items are, instructions first. Raises `RequestError`.

    What an assistant thinks, says and calls in a row is one message, as chat templates have it. The first `before`
    items are those of earlier responses, which the request does not count.
    """
    turns: list[dict[str, Any]] = []
    if instructions is not None:
        turns.append({"role": "system", "content": instructions})
    names: dict[str | None, str | None] = {}
    for position, item in enumerate(items):
        match item.type:
            case "message" if item.role != "assistant":
                turns.append({"role": item.role, "content": text_of(item.content)})
            case "function_call_output":
                if item.call_id not in names:
                    message = f"input[{position - before}].call_id is that of no function_call before it"
                    raise RequestError(message, param=f"input[{position - before}].call_id")
                turns.append(
                    {
                        "role": "tool",
                        "tool_call_id": item.call_id,
                        "name": names[item.call_id],
                        "content": text_of(item.output),
                    }
                )
            case _:
                _add_to_assistant(turns, item)
                if item.type == "function_call":
                    names[item.call_id] = item.name
    return turns


def _add_to_assistant(turns: list[dict[str, Any]], item: InputItem) -> None:
    """Add an item to the assistant's last turn, or begin one: for what is said once more without a call before it."""
    last: dict[str, Any] | None = turns[-1] if turns and turns[-1]["role"] == "assistant" else None
    if last is None or (item.type != "function_call" and last["content"] and "tool_calls" not in last):
        last = {"role": "assistant", "content": ""}
        turns.append(last)
    match item.type:
        case "function_call":
            function = {"name": item.name, "arguments": as_object(item.arguments or "")}
            last.setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
        case "reasoning":
            if thought := text_of(item.content or item.summary):
                before = last.get("reasoning_content")
                last["reasoning_content"] = thought if before is None else f"{before}\n{thought}"
        case _:
            last["content"] = "\n".join(filter(None, (last["content"], text_of(item.content))))
