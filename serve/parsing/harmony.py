"""Channels of gpt-oss's harmony format: thoughts in `analysis`, the answer in `final`, calls of tools in `commentary`.

    <|channel|>analysis<|message|>2 + 2<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>

The prompt ends in `<|start|>assistant`, so that an answer begins within a header.
"""

import re
from collections.abc import Collection

from serve.parsing.events import Collector, Event
from serve.parsing.json_calls import begins_object
from serve.parsing.tags import find_first, may_become

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
CONSTRAIN, END, CALL, RETURN = "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"
TAGS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
ENDING = (CALL, RETURN)
"""What ends an answer: tokens at which decoding has to stop."""

MAX_HEADER = 512
"""Characters. What is longer is no header, but text."""

_OPENINGS = (START, CHANNEL, MESSAGE, "to=")
_CHANNEL = re.compile(rf"{re.escape(CHANNEL)}\s*(\w+)")
_RECIPIENT = re.compile(r"(?<!\S)to=([^\s<]+)|(?<=>)to=([^\s<]+)")
_LEADING_TAG = re.compile(r"\s*<\|\w+\|>")
_FUNCTIONS = "functions."


class HarmonyParser:
    """`tools` are the names that may be called. A message to anything else is text, or a thought of its channel.

    Messages of one kind are put together with a newline between them. Headers and tags are nobody's text.
    """

    def __init__(self, tools: Collection[str] = (), *, thoughts: bool = True):
        """Without `thoughts`, what `analysis` says is text, too."""
        self.thinking: bool | None = None
        self._tools = tools
        self._thoughts = thoughts
        self._out = Collector()
        self._buffer = ""
        self._state = "opening"
        self._tool: str | None = None
        self._is_called = False
        self._has_spoken = {True: False, False: False}  # by whether it was a thought
        self._owes_newline = False

    def feed(self, text: str) -> list[Event]:
        """What has become certain with this piece."""
        self._buffer += text
        steps = {"opening": self._read_opening, "header": self._read_header, "body": self._read_body}
        while self._buffer and steps[self._state]():
            pass
        return self._out.take()

    def finish(self) -> list[Event]:
        """What is left at the end of the answer. The beginning of a header is left out, that of another tag is text."""
        rest, self._buffer = self._buffer, ""
        if self._state == "body":
            self._say(rest)
            self._end_message()
        elif self._state == "opening" and rest.strip() and not _is_header(rest):
            self._begin_text()
            self._say(rest)
        return self._out.finish()

    def _read_opening(self) -> bool:
        """Before a message: a header, or a text without one, as constrained decoding makes it."""
        start = self._buffer.lstrip()
        if may_become(start, _OPENINGS):
            return False
        if start.startswith(_OPENINGS):
            self._state = "header"
        else:
            self._begin_text()
        return True

    def _read_header(self) -> bool:
        found = find_first(self._buffer, (MESSAGE, END, CALL, RETURN))
        if found.start > MAX_HEADER:
            self._begin_text()
            self._buffer = _LEADING_TAG.sub("", self._buffer)
            return True
        if found.tag is None:
            return False
        header, self._buffer = self._buffer[: found.start], self._buffer[found.end :]
        if found.tag == MESSAGE:
            self._begin_message(header)
        else:
            self._state, self.thinking = "opening", None
        return True

    def _begin_message(self, header: str) -> None:
        header = header.rpartition(START)[2]
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        name = "" if recipient is None else recipient[1] or recipient[2]
        self._begin_text()
        self._tool = name.removeprefix(_FUNCTIONS) if name.startswith(_FUNCTIONS) else None
        if self._tool not in self._tools:
            self._tool = None
        if self._tool is None and channel is not None and channel[1] == "analysis":
            self.thinking = self._thoughts

    def _begin_text(self) -> None:
        self._state, self.thinking, self._tool, self._is_called = "body", False, None, False
        self._owes_newline = True

    def _read_body(self) -> bool:
        if self._tool is not None and not self._is_called and not self._decide_call():
            return False
        found = find_first(self._buffer, TAGS)
        self._say(self._buffer[: found.start])
        self._buffer = self._buffer[found.end :]
        if found.tag in (END, CALL, RETURN):
            self._end_message()
        elif found.tag in (START, CHANNEL):  # the end was forgotten
            self._buffer = found.tag + self._buffer
            self._end_message()
        return found.tag is not None

    def _decide_call(self) -> bool:
        """Whether the body is known to be arguments, or to be none: then it is text."""
        start = self._buffer.lstrip()
        verdict = begins_object(start)
        if verdict is None:
            return False
        if verdict and self._tool is not None:
            self._out.call(self._tool)
            self._is_called = True
        else:
            self._tool = None
        return True

    def _say(self, text: str) -> None:
        thought = bool(self.thinking)
        if self._is_called:
            self._out.arguments(text)
            return
        if not text:
            return
        if self._owes_newline and self._has_spoken[thought]:
            text = "\n" + text
        self._owes_newline, self._has_spoken[thought] = False, True
        (self._out.thought if thought else self._out.text)(text)

    def _end_message(self) -> None:
        self._state, self.thinking = "opening", None
        self._tool, self._is_called = None, False


def _is_header(text: str) -> bool:
    start = text.lstrip()
    return start.startswith((*_OPENINGS, "<|")) and (start.startswith(_OPENINGS) or may_become(start, _OPENINGS))
