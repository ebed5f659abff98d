"""A call in the tags of GLM-4.5, read as it comes; its parameters become one JSON object.

weather
<arg_key>city</arg_key>
<arg_value>Oslo</arg_value>
"""

from collections.abc import Mapping
from typing import Any

from serve.parsing.events import Collector
from serve.parsing.parameter_call import MAX_NAME, ParameterCall
from serve.parsing.tags import find_first

KEY, END_KEY = "<arg_key>", "</arg_key>"
VALUE, END_VALUE = "<arg_value>", "</arg_value>"
TAGS = (KEY, END_KEY, VALUE, END_VALUE)


class GlmCall(ParameterCall):
    """It counts from the first tag behind its function's name on."""

    end_value = END_VALUE
    in_lines = False

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], out: Collector, closer: str):
        super().__init__(tools, out, closer)
        self._key = ""  # whose value has not begun

    def _read_tag(self, text: str, at: int) -> int | None:
        if not self.is_call:
            return self._read_name(text, at)
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

    def _read_name(self, text: str, at: int) -> int | None:
        """The name of the function, up to the first tag: before that it may be no call."""
        found = find_first(text[at:], (KEY, self._closer))
        name = text[at : at + found.start].strip()
        if found.tag is None and len(name) <= MAX_NAME:
            return None
        return at + found.start if self._begin_call(name) else at

    def _follow(self, tag: str, text: str, at: int) -> int | None:
        if tag == VALUE and self._key:
            self._begin_value(self._key)
            self._key = ""
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
            self._end_call()
            return at - len(tag)
        key = text[at : max(at, end)].strip()
        if not key:
            self._aside += tag
            return at
        self._key = key
        return end + len(END_KEY)
