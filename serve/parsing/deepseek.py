"""Calls as DeepSeek-V3, R1 and V3.1 write them: a name and its arguments, between tags that have wide bars.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather
```json
{"city": "Oslo"}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

V3.1 writes the name before the separator and the arguments behind it.
"""

import re
from collections.abc import Collection

from serve.parsing.events import Collector, Event
from serve.parsing.json_calls import Nested, begins_object
from serve.parsing.tags import find_first, may_become

OPEN, CLOSE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
TAGS = (OPEN, CLOSE, CALL, END_CALL, SEPARATOR)
FUNCTION = "function"
"""What stands before the separator where the name stands behind it."""
FENCE, END_FENCE = "\n```json\n", "\n```"

_NAME = r"([\w.-]{1,256})"
_HEAD = re.compile(
    rf"\s*(?:{FUNCTION}\s*{SEPARATOR}\s*{_NAME}\s*```(?:json)?|{_NAME}\s*{SEPARATOR})\s*(?=\{{)", re.ASCII
)
MAX_HEAD = 400
"""Characters before the arguments. What is longer is no call."""


class DeepSeekCalls:
    """`tools` are the names that may be called. What is no call is text, tags included."""

    thinking: bool | None = False

    def __init__(self, tools: Collection[str]):
        self._tools = tools
        self._out = Collector()
        self._buffer = ""
        self._opening = ""  # tags before the call that is being read
        self._state = self._read_text
        self._arguments = Nested(END_CALL)

    def feed(self, text: str) -> list[Event]:
        """What has become certain with this piece."""
        self._buffer += text
        while self._buffer and self._state():
            pass
        return self._out.take()

    def finish(self) -> list[Event]:
        """What is left at the end of the answer. A call that has not begun by then is text."""
        if self._state == self._read_arguments:
            self._out.arguments(self._buffer)
        elif self._state != self._read_behind:  # there, it is the beginning of a tag
            self._out.text(self._opening + self._buffer)
        return self._out.finish()

    def _read_text(self) -> bool:
        found = find_first(self._buffer, (OPEN, CALL))
        self._out.text(self._buffer[: found.start])
        self._buffer = self._buffer[found.end :]
        if found.tag is None:
            return False
        self._opening = found.tag
        self._state = self._read_opening if found.tag == OPEN else self._read_head
        return True

    def _read_opening(self) -> bool:
        """Between the tag that begins all calls and that of the first one."""
        start = self._buffer.lstrip()
        if may_become(start, (CALL,)):
            return False
        if start.startswith(CALL):
            blanks = len(self._buffer) - len(start)
            self._opening += self._buffer[: blanks + len(CALL)]
            self._buffer, self._state = start.removeprefix(CALL), self._read_head
        else:
            self._fail()
        return True

    def _read_head(self) -> bool:
        """All that stands before the brace of the arguments."""
        brace = self._buffer.find("{", 0, MAX_HEAD)
        if brace < 0 and len(self._buffer) < MAX_HEAD and not find_first(self._buffer, (OPEN, CALL)).tag:
            return False
        match = _HEAD.match(self._buffer) if brace >= 0 else None
        verdict = begins_object(self._buffer[match.end() :]) if match is not None else False
        if verdict is None:
            return False
        name = "" if match is None else match[1] or match[2]
        if match is None or not verdict or name not in self._tools:
            self._fail()
            return True
        self._out.call(name)
        self._opening, self._buffer = "", self._buffer[match.end() :]
        self._arguments, self._state = Nested(END_CALL), self._read_arguments
        return True

    def _fail(self) -> None:
        """It is no call. The tags are text, and what is behind them is looked through for calls."""
        self._out.text(self._opening)
        self._opening, self._state = "", self._read_text

    def _read_arguments(self) -> bool:
        end = self._arguments.scan(self._buffer, 0)
        self._out.arguments(self._buffer[:end])
        self._buffer = self._buffer[end:]
        if self._arguments.ended:
            self._state = self._read_behind
        return self._arguments.ended

    def _read_behind(self) -> bool:
        """Behind arguments: the end of a fence, of the call, of all calls, or another call. Blanks are nobody's."""
        start = self._buffer.lstrip()
        ends = ("```", END_CALL, CLOSE)
        if may_become(start, (*ends, CALL)):
            return False
        for tag in ends:
            if start.startswith(tag):
                self._buffer = start.removeprefix(tag)
                if tag == CLOSE:
                    self._state = self._read_text
                return True
        self._state = self._read_text
        return True
