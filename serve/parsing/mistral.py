"""Calls behind Mistral's `[TOOL_CALLS]`: a list of JSON objects, or a name and its arguments.

[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]
[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}
"""

import re
from collections.abc import Collection

from serve.parsing.events import Collector, Event
from serve.parsing.json_calls import JsonCall, Nested, begins_object
from serve.parsing.tagged_calls import RESCANNED
from serve.parsing.tags import find_first

OPEN, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
TAGS = (OPEN, ARGUMENTS, CALL_ID)

_NAMED = re.compile(r"\s*([\w.-]{1,256})(?:\s*\[CALL_ID\]\s*\w{1,64})?\s*(?:\[ARGS\])?\s*(?=\{)", re.ASCII)
MAX_HEAD = 400
"""Characters before the arguments. What is longer is no call."""


class MistralCalls:
    """`tools` are the names that may be called. What is no call is text, tags included."""

    thinking: bool | None = False

    def __init__(self, tools: Collection[str]):
        self._tools = tools
        self._out = Collector()
        self._buffer = ""
        self._state = self._read_text
        self._opening = ""
        self._call: JsonCall | None = None
        self._arguments: Nested | None = None

    def feed(self, text: str) -> list[Event]:
        """What has become certain with this piece."""
        self._buffer += text
        while self._buffer and self._state():
            pass
        return self._out.take()

    def finish(self) -> list[Event]:
        """What is left at the end of the answer. A call that has not begun by then is text."""
        rest = self._buffer
        if self._state == self._behind_element:  # a comma, behind which nothing has come
            rest = ""
        if self._call is not None and not self._call.is_call:
            rest = self._call.raw + rest
        if self._arguments is not None or (self._call is not None and self._call.is_call):
            self._out.arguments(rest)
        else:
            self._out.text(self._opening + rest)
        return self._out.finish()

    def _read_text(self) -> bool:
        found = find_first(self._buffer, (OPEN,))
        self._out.text(self._buffer[: found.start])
        self._buffer = self._buffer[found.end :]
        if found.tag is None:
            return False
        self._opening, self._state = OPEN, self._choose_form
        return True

    def _choose_form(self) -> bool:
        start = self._buffer.lstrip()
        if not start:
            return False
        if start[0] == "[" and not start.startswith(OPEN):
            self._opening += self._buffer[: len(self._buffer) - len(start) + 1]
            self._buffer = start[1:]
            self._state = self._next_of_list
        elif start[0] == "{":
            self._begin(JsonCall(self._tools, self._out))
        else:
            self._state = self._read_head
        return True

    def _begin(self, call: JsonCall) -> None:
        self._call, self._state = call, self._read_json

    def _read_json(self) -> bool:
        call = self._call
        assert call is not None
        self._buffer = self._buffer[call.feed(self._buffer) :]
        if call.status == "open":
            return False
        self._call = None
        if call.status == "failed":
            self._fail(call.raw)
        else:
            is_list = self._opening != OPEN
            self._opening, self._state = "", self._behind_element if is_list else self._read_text
        return True

    def _fail(self, raw: str) -> None:
        """It is no call. What it was taken for is text, and looked through for calls unless it is long."""
        self._out.text(self._opening)
        self._opening, self._state = "", self._read_text
        if len(raw) <= RESCANNED:
            self._buffer = raw + self._buffer
        else:
            self._out.text(raw)

    def _next_of_list(self) -> bool:
        self._begin(JsonCall(self._tools, self._out))
        return True

    def _behind_element(self) -> bool:
        start = self._buffer.lstrip()
        if not start:
            return False
        if start[0] == ",":
            rest = start[1:].lstrip()
            if not rest:
                return False
            if rest[0] == "{":
                self._opening, self._buffer = start[: len(start) - len(rest)], rest
                self._state = self._next_of_list
                return True
        elif start[0] == "]":
            self._buffer = start[1:]
        self._state = self._read_text
        return True

    def _read_head(self) -> bool:
        """A name, up to the brace of its arguments."""
        brace = self._buffer.find("{", 0, MAX_HEAD)
        if brace < 0 and len(self._buffer) <= MAX_HEAD and not find_first(self._buffer, (OPEN,)).tag:
            return False
        match = _NAMED.match(self._buffer) if brace >= 0 else None
        verdict = begins_object(self._buffer[match.end() :]) if match is not None else False
        if verdict is None:
            return False
        if match is None or not verdict or match[1] not in self._tools:
            self._fail("")
            return True
        self._out.call(match[1])
        self._opening, self._buffer = "", self._buffer[match.end() :]
        self._arguments, self._state = Nested(""), self._read_arguments
        return True

    def _read_arguments(self) -> bool:
        assert self._arguments is not None
        end = self._arguments.scan(self._buffer, 0)
        self._out.arguments(self._buffer[:end])
        self._buffer = self._buffer[end:]
        if self._arguments.ended:
            self._arguments, self._state = None, self._read_text
        return True
