"""Reads one answer as the engine makes it: what it says so far, and how it ended."""

import dataclasses
import secrets
from typing import Any

import pydantic_core

from emoe_jax.requests.request import Delta
from serve.parsing.answer_parser import AnswerParser
from serve.parsing.events import CallArguments, CallBegun, Event, Text, Thought

INVALID_JSON = "INVALID_JSON"
"""The key under which an object has arguments that are no JSON: nothing is lost."""
ID_LENGTH = 9
"""Letters and digits of a call's id that the chat templates of Mistral ask for."""


@dataclasses.dataclass
class Call:
    """One call of a tool. `arguments` are JSON, whole when the answer was not cut."""

    name: str
    arguments: str = ""
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(ID_LENGTH)[:ID_LENGTH])


class AnswerReader:
    """What one answer has said so far, whether it is sent whole or in pieces."""

    def __init__(self, parser: AnswerParser):
        self.parser = parser
        self.reasoning = ""
        self.content = ""
        self.calls: list[Call] = []

    def add(self, delta: Delta) -> list[Event]:
        """What is certain with this delta and was not before."""
        events = self.parser.feed(delta.text, len(delta.token_ids))
        if delta.finish_reason is not None:
            events += self.parser.finish()
        for event in events:
            match event:
                case Thought(text):
                    self.reasoning += text
                case Text(text):
                    self.content += text
                case CallBegun(_, name):
                    self.calls.append(Call(name))
                case CallArguments(call, text):
                    self.calls[call].arguments += text
        return events

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's name for how the answer ended: one that ended by itself in calls asks for their results."""
        return "tool_calls" if reason == "stop" and self.calls else reason


def as_object(arguments: str) -> dict[str, Any]:
    """Arguments of a call as an object: as far as they go where the answer was cut."""
    try:
        value = pydantic_core.from_json(arguments or "{}", allow_partial="trailing-strings", allow_inf_nan=False)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {INVALID_JSON: arguments}
