"""A call in the tags of Qwen3-Coder, read as it comes; its parameters become one JSON object.

<function=weather>
<parameter=city>
Oslo
</parameter>
</function>
"""

from collections.abc import Mapping
from typing import Any

from serve.parsing.events import Collector
from serve.parsing.parameters import Parameters
from serve.parsing.tags import begun, find_first

FUNCTION = "<function="
_PARAMETER, _END_PARAMETER, _END_FUNCTION = "<parameter=", "</parameter>", "</function>"
MAX_NAME = 256
"""Characters of a function's or parameter's name."""


class XmlCall:
    """One call. It counts from its function's name on; `tools` are schemas of parameters by the names that may be
    called. As for `status` and `raw`, it is like `JsonCall`.
    """

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], out: Collector, closer: str):
        self.status = "open"
        self.is_call = False
        self.raw = ""
        self._tools = tools
        self._out = out
        self._closer = closer
        self._parameters = Parameters({}, out, in_lines=True)
        self._in_value = False
        self._aside = ""  # what is neither tag nor value: said behind the call, whose arguments come in one piece

    def feed(self, text: str) -> int:
        """Read on; returns how much was read. The rest has to come again, with more behind it."""
        at = 0
        while self.status == "open":
            step = self._read_value if self._in_value else self._read_tag
            end = step(text, at)
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

    def _read_tag(self, text: str, at: int) -> int | None:
        start = len(text) - len(text[at:].lstrip())
        tags = (_PARAMETER, _END_FUNCTION, self._closer) if self.is_call else (FUNCTION,)
        for tag in tags:
            if text.startswith(tag, start):
                return self._follow(tag, text, start + len(tag))
        if any(tag.startswith(text[start:]) for tag in tags):
            return None
        if not self.is_call:
            self.status = "failed"
            return at
        end = start + find_first(text[start:], tags).start
        self._aside += text[at:end].rstrip()
        return end

    def _follow(self, tag: str, text: str, at: int) -> int | None:
        if tag in (_END_FUNCTION, self._closer):
            self._parameters.end()
            self._out.text(self._aside.strip())
            self.status = "done"
            return at if tag == _END_FUNCTION else at - len(tag)
        end = text.find(">", at, at + MAX_NAME)
        if end < 0 and len(text) - at < MAX_NAME:
            return None
        name = text[at : max(at, end)].strip()
        if tag == FUNCTION:
            if name not in self._tools:
                self.status = "failed"
                return at
            self.is_call, self.raw = True, ""
            self._parameters = Parameters(self._tools[name], self._out, in_lines=True)
            self._out.call(name)
        elif not name:
            self._aside += tag
            return at
        else:
            self._parameters.begin(name)
            self._in_value = True
        return end + 1

    def _read_value(self, text: str, at: int) -> int | None:
        end = text.find(_END_PARAMETER, at)
        if self._parameters.is_text:
            until = end if end >= 0 else len(text) - begun(text[at:], (_END_PARAMETER,))
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
        return end + len(_END_PARAMETER)
