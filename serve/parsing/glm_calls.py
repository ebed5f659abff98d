"""A call in the tags of GLM-4.5, read as it comes; its parameters become one JSON object.

weather
<arg_key>city</arg_key>
<arg_value>Oslo</arg_value>
"""

from collections.abc import Mapping
from typing import Any

from serve.parsing.events import Collector
from serve.parsing.parameters import Parameters
from serve.parsing.tags import begun, find_first

KEY, END_KEY = "<arg_key>", "</arg_key>"
VALUE, END_VALUE = "<arg_value>", "</arg_value>"
TAGS = (KEY, END_KEY, VALUE, END_VALUE)
MAX_NAME = 256
"""Characters of a function's or parameter's name."""


class GlmCall:
    """One call. It counts from the first tag behind its function's name on; `tools` are schemas of parameters by the
    names that may be called. As for `status` and `raw`, it is like `JsonCall`.
    """

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], out: Collector, closer: str):
        self.status = "open"
        self.is_call = False
        self.raw = ""
        self._tools = tools
        self._out = out
        self._closer = closer
        self._parameters = Parameters({}, out, in_lines=False)
        self._key = ""  # whose value has not begun
        self._in_value = False
        self._aside = ""  # what is neither tag nor value: said behind the call, whose arguments come in one piece

    def feed(self, text: str) -> int:
        """Read on; returns how much was read. The rest has to come again, with more behind it."""
        at = 0
        while self.status == "open":
            if self._in_value:
                end = self._read_value(text, at)
            else:
                end = self._read_tag(text, at) if self.is_call else self._read_name(text, at)
            if end is None:
                break
            at = end
        if not self.is_call:
            self.raw += text[:at]
        return at

    def finish(self, rest: str) -> None:
        """The answer ends within the call: what came of the last value is passed on, and its end stays open."""
        if self._in_value and not self._parameters.is_text:
            self._parameters.cut(rest.strip())
        self._out.text(self._aside.strip())

    def _read_name(self, text: str, at: int) -> int | None:
        """The name of the function, up to the first tag: before that it may be no call."""
        tags = (KEY, self._closer)
        found = find_first(text[at:], tags)
        name = text[at : at + found.start].strip()
        if found.tag is None and len(name) <= MAX_NAME:
            return None
        if name not in self._tools:
            self.status = "failed"
            return at
        self.is_call, self.raw = True, ""
        self._parameters = Parameters(self._tools[name], self._out, in_lines=False)
        self._out.call(name)
        return at + found.start

    def _read_tag(self, text: str, at: int) -> int | None:
        start = len(text) - len(text[at:].lstrip())
        tags = (KEY, VALUE, self._closer)
        for tag in tags:
            if text.startswith(tag, start):
                return self._follow(tag, text, start + len(tag))
        if any(tag.startswith(text[start:]) for tag in tags):
            return None
        end = start + find_first(text[start:], tags).start
        self._aside += text[at:end].rstrip()
        return end

    def _follow(self, tag: str, text: str, at: int) -> int | None:
        if tag == VALUE and self._key:
            self._parameters.begin(self._key)
            self._key, self._in_value = "", True
            return at
        if tag == VALUE:
            self._aside += tag
            return at
        end = text.find(END_KEY, at, at + MAX_NAME + len(END_KEY)) if tag == KEY else at
        if end < 0 and len(text) - at < MAX_NAME + len(END_KEY):
            return None
        if self._key:  # it got no value
            self._aside += f"{KEY}{self._key}{END_KEY}"
            self._key = ""
        if tag == self._closer:
            self._parameters.end()
            self._out.text(self._aside.strip())
            self.status = "done"
            return at - len(tag)
        key = text[at : max(at, end)].strip()
        if not key:
            self._aside += tag
            return at
        self._key = key
        return end + len(END_KEY)

    def _read_value(self, text: str, at: int) -> int | None:
        end = text.find(END_VALUE, at)
        if self._parameters.is_text:
            until = end if end >= 0 else len(text) - begun(text[at:], (END_VALUE,))
            if until == at and end < 0:
                return None
            self._parameters.add(text[at:until], last=end >= 0)
            if end < 0:
                return until
        elif end < 0:
            return None
        else:
            self._parameters.write(text[at:end].strip())
        self._in_value = False
        return end + len(END_VALUE)
