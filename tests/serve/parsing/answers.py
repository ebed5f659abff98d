"""Reading an answer in pieces, and what came of it."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from serve.parsing.answer_parser import AnswerParser
from serve.parsing.events import CallArguments, CallBegun, Event, Text, Thought
from serve.parsing.forms import AnswerForm

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "celsius": {"type": "boolean"},
            "at": {"type": "object"},
            "tags": {"type": "array"},
            "zip": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
    },
    "now": {},
    "search-web.v2": {"type": "object", "properties": {"query": {"type": "string"}}},
}


class Read(NamedTuple):
    """An answer: thoughts, text, and calls with their names and arguments."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def collected(events: Iterable[Event]) -> Read:
    """What events say together. A call has begun before its arguments come, and nothing comes between them."""
    thoughts, texts, calls = [], [], list[tuple[str, str]]()
    last: Event | None = None
    for event in events:
        match event:
            case Thought(text):
                thoughts.append(text)
            case Text(text):
                texts.append(text)
            case CallBegun(call, name):
                assert call == len(calls)
                calls.append((name, ""))
            case CallArguments(call, text):
                assert call == len(calls) - 1
                assert isinstance(last, CallBegun | CallArguments)
                calls[call] = (calls[call][0], calls[call][1] + text)
        last = event
    return Read("".join(thoughts), "".join(texts), tuple(calls))


def read(pieces: Sequence[str], form: AnswerForm, tools: Any = TOOLS, **options: Any) -> Read:
    """What an answer says that comes in these pieces."""
    parser = AnswerParser(form, tools, **options)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return collected([*events, *parser.finish()])


def loaded(answer: Read) -> list[tuple[str, Any]]:
    """The calls, with their arguments as values."""
    return [(name, json.loads(arguments)) for name, arguments in answer.calls]
