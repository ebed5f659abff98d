"""A call whose parameters stand in tags, read as it comes: what the forms of Qwen3-Coder and GLM have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from serve.parsing.events import Collector
from serve.parsing.parameters import Parameters
from serve.parsing.tags import begun

MAX_NAME = 256
"""Characters of a function's or parameter's name."""


class ParameterCall(ABC):
    """One call, whose parameters become one JSON object. `tools` are schemas of parameters by the names that may be
    called. As for `status` and `raw`, it is like `JsonCall`.
    """

    end_value: ClassVar[str]
    """The tag behind a value."""
    in_lines: ClassVar[bool]
    """Whether values stand in lines of their own."""

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], out: Collector, closer: str):
        self.status = "open"
        self.is_call = False
        self.raw = ""
        self._tools = tools
        self._out = out
        self._closer = closer
        self._parameters = Parameters({}, out, in_lines=self.in_lines)
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

    @abstractmethod
    def _read_tag(self, text: str, at: int) -> int | None:
        """Read the text from `at` on up to a value; where it was read to, or None where more has to come first."""

    def _begin_call(self, name: str) -> bool:
        """It is a call of this function. Whether there is such a one."""
        if name not in self._tools:
            self.status = "failed"
            return False
        self.is_call, self.raw = True, ""
        self._parameters = Parameters(self._tools[name], self._out, in_lines=self.in_lines)
        self._out.call(name)
        return True

    def _begin_value(self, name: str) -> None:
        self._parameters.begin(name)
        self._in_value = True

    def _end_call(self) -> None:
        self._parameters.end()
        self._out.text(self._aside.strip())
        self.status = "done"

    def _read_value(self, text: str, at: int) -> int | None:
        end = text.find(self.end_value, at)
        if self._parameters.is_text:
            until = end if end >= 0 else len(text) - begun(text[at:], (self.end_value,))
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
        return end + len(self.end_value)
