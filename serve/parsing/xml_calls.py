"""A call in the tags of Qwen3-Coder, read as it comes; its parameters become one JSON object.

<function=weather>
<parameter=city>
Oslo
</parameter>
</function>
"""

import json
from collections.abc import Mapping
from typing import Any

from serve.parsing.events import Collector
from serve.parsing.tags import begun, find_first

FUNCTION = "<function="
_PARAMETER, _END_PARAMETER, _END_FUNCTION = "<parameter=", "</parameter>", "</function>"
MAX_NAME = 256
"""Characters of a function's or parameter's name."""

_WORDS = {"True": "true", "False": "false", "None": "null"}
"""Python's names for what JSON calls otherwise: models mix them up."""

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class XmlCall:
    """One call. It counts from its function's name on; `tools` are schemas of parameters by the names that may be
    called. Text parameters are passed on as they come, others when they are whole. As for `status` and `raw`, it is
    like `JsonCall`.
    """

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], out: Collector, closer: str):
        self.status = "open"
        self.is_call = False
        self.raw = ""
        self._tools = tools
        self._out = out
        self._closer = closer
        self._properties: Mapping[str, Any] = {}
        self._values = 0
        self._key = ""
        self._written = False  # whether characters of the value have come
        self._newline = ""  # the last one, which is not the value's if nothing follows

    def feed(self, text: str) -> int:
        """Read on; returns how much was read. The rest has to come again, with more behind it."""
        at = 0
        while self.status == "open":
            step = self._read_value if self._key else self._read_tag
            end = step(text, at)
            if end is None:
                break
            at = end
        if not self.is_call:
            self.raw += text[:at]
        return at

    def finish(self, rest: str) -> None:
        """The answer ends within the call: what came of the last value is passed on, and its end stays open."""
        if self._key and not self._is_text:
            self._out.arguments(rest.strip())

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
        self._out.text(text[at:end].rstrip())  # no tag, so it is said to the reader
        return end

    def _follow(self, tag: str, text: str, at: int) -> int | None:
        if tag in (_END_FUNCTION, self._closer):
            self._out.arguments("}" if self._values else "{}")
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
            properties = self._tools[name].get("properties")
            self._properties = properties if isinstance(properties, Mapping) else {}
            self._out.call(name)
        elif not name:
            self._out.text(tag)
            return at
        else:
            self._out.arguments(f"{', ' if self._values else '{'}{json.dumps(name, ensure_ascii=False)}: ")
            self._values += 1
            self._key, self._written, self._newline = name, False, ""
        return end + 1

    @property
    def _types(self) -> list[str]:
        """What the parameter may be, as far as its schema names types."""
        schema = self._properties.get(self._key)
        if not isinstance(schema, Mapping):
            return []
        options = schema.get("anyOf") or schema.get("oneOf") or [schema]
        found: list[str] = []
        for option in options if isinstance(options, list) else []:
            named = option.get("type") if isinstance(option, Mapping) else None
            found += [named] if isinstance(named, str) else named if isinstance(named, list) else []
        return found

    @property
    def _is_text(self) -> bool:
        return self._types in ([], ["string"])

    def _read_value(self, text: str, at: int) -> int | None:
        end = text.find(_END_PARAMETER, at)
        if self._is_text:
            until = end if end >= 0 else len(text) - begun(text[at:], (_END_PARAMETER,))
            if until == at and end < 0:
                return None
            self._write_text(text[at:until], last=end >= 0)
            if end < 0:
                return until
        elif end < 0:
            return None
        else:
            self._out.arguments(self._as_json(text[at:end].strip()))
        self._key = ""
        return end + len(_END_PARAMETER)

    def _write_text(self, text: str, *, last: bool) -> None:
        """A piece of a text, without the line ends beside the tags."""
        if not self._written:
            if not text and not last:
                return
            self._out.arguments('"')
            self._written = True
            text = text.removeprefix("\n")
        text = self._newline + text
        self._newline = "\n" if text.endswith("\n") else ""
        self._out.arguments(json.dumps(text.removesuffix("\n"), ensure_ascii=False)[1:-1])
        if last:
            self._out.arguments('"')

    def _as_json(self, text: str) -> str:
        """The value in JSON: as it is written where the schema allows its type, or no text; else as a text."""
        written = _WORDS.get(text, text)
        try:
            value = json.loads(written, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return json.dumps(text, ensure_ascii=False)
        allowed = tuple(kind for name in self._types for kind in _TYPES.get(name, ()))
        fits = isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)
        return written if fits or "string" not in self._types else json.dumps(text, ensure_ascii=False)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
