"""Calls between `<tool_call>` and `</tool_call>`: JSON as of Hermes and Qwen, or the tags of Qwen3-Coder or GLM."""

from collections.abc import Mapping
from typing import Any, Literal

from serve.parsing.events import Collector, Event
from serve.parsing.glm_calls import GlmCall
from serve.parsing.json_calls import JsonCall
from serve.parsing.tags import find_first, may_become
from serve.parsing.xml_calls import FUNCTION, XmlCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"

RESCANNED = 1024
"""Characters of what turned out to be no call that are looked through again for one. More of them are text."""


class TaggedCalls:
    """`tools` are schemas of parameters by the names that may be called. What is no call is text, tags included."""

    thinking: bool | None = False

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], inside: Literal["json", "xml", "glm"] = "json"):
        """Calls may come as JSON, and as `inside` says: in GLM's tags, or in Qwen3-Coder's ("xml"), also without
        `<tool_call>` around them.
        """
        self._tools = tools
        self._inside = inside
        self._openings = (OPEN, FUNCTION) if inside == "xml" else (OPEN,)
        self._out = Collector()
        self._buffer = ""
        self._opening = ""  # what the call being read began with
        self._call: JsonCall | XmlCall | GlmCall | None = None
        self._is_inside = False  # behind a call whose `</tool_call>` has not come

    def feed(self, text: str) -> list[Event]:
        """What has become certain with this piece."""
        self._buffer += text
        while self._buffer and self._step():
            pass
        return self._out.take()

    def finish(self) -> list[Event]:
        """What is left at the end of the answer. A call that has not begun by then is text."""
        rest, call = self._buffer, self._call
        if self._is_inside and may_become(rest.lstrip(), (CLOSE,)):
            rest = ""
        if call is None:
            self._out.text(self._opening + rest)
        elif not call.is_call:
            self._out.text(self._opening + call.raw + rest)
        else:
            call.finish(rest)
        return self._out.finish()

    def _step(self) -> bool:
        if self._call is not None:
            return self._read_call()
        if self._opening:
            return self._choose_form()
        if self._is_inside:
            return self._read_behind()
        found = find_first(self._buffer, self._openings)
        self._out.text(self._buffer[: found.start])
        self._buffer = self._buffer[found.end :]
        if found.tag is None:
            return False
        self._opening = found.tag
        if found.tag == FUNCTION:
            self._opening, self._buffer = "", FUNCTION + self._buffer
            self._call = XmlCall(self._tools, self._out, CLOSE)
        return True

    def _choose_form(self) -> bool:
        start = self._buffer.lstrip()
        xml, glm = self._inside == "xml", self._inside == "glm"
        if (glm and not start) or (xml and may_become(start, (FUNCTION,))):
            return False
        if xml and start.startswith(FUNCTION):
            self._call = XmlCall(self._tools, self._out, CLOSE)
        elif glm and start[0] != "{":
            self._call = GlmCall(self._tools, self._out, CLOSE)
        else:
            self._call = JsonCall(self._tools, self._out, CLOSE)
        return True

    def _read_call(self) -> bool:
        call = self._call
        assert call is not None
        read = call.feed(self._buffer)
        self._buffer = self._buffer[read:]
        if call.status == "open":
            return False
        self._call = None
        if call.status == "done":
            self._opening, self._is_inside = "", True
            return True
        opening, raw, self._opening = self._opening, call.raw, ""
        if len(raw) <= RESCANNED and (opening or not raw.startswith(FUNCTION)):
            self._out.text(opening)
            self._buffer = raw + self._buffer
        elif len(raw) <= RESCANNED:  # the tag itself, which would be found again
            self._out.text(FUNCTION)
            self._buffer = raw.removeprefix(FUNCTION) + self._buffer
        else:
            self._out.text(opening + raw)
        return True

    def _read_behind(self) -> bool:
        """Behind a call: the end of its tag, or another call in the same one."""
        start = self._buffer.lstrip()
        if may_become(start, (CLOSE,)):
            return False
        if start.startswith(CLOSE):
            self._buffer = start.removeprefix(CLOSE)
        elif start.startswith("{"):
            self._call = JsonCall(self._tools, self._out, CLOSE)
            self._buffer = start
        self._is_inside = False
        return True
