"""Parameters of a call that a model writes in tags, each by itself, as one JSON object that is written as they come."""

import json
from collections.abc import Mapping
from typing import Any

from serve.parsing.events import Collector

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


class Parameters:
    """Writes them into the arguments of the call that `out` has begun. `schema` is that of the whole object.

    Text parameters are passed on as they come, others when they are whole. With `in_lines`, the line ends at both ends
    of a text are not part of it.
    """

    def __init__(self, schema: Mapping[str, Any], out: Collector, *, in_lines: bool):
        properties = schema.get("properties")
        self._properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self._out = out
        self._in_lines = in_lines
        self._values = 0
        self._types: list[str] = []
        self._written = False  # whether characters of the value have come
        self._newline = ""  # the last one, which is not the value's if nothing follows

    def begin(self, name: str) -> None:
        """The next parameter is called so."""
        self._out.arguments(f"{', ' if self._values else '{'}{json.dumps(name, ensure_ascii=False)}: ")
        self._values += 1
        self._types = _types_of(self._properties.get(name))
        self._written, self._newline = False, ""

    def end(self) -> None:
        """There are no more parameters."""
        self._out.arguments("}" if self._values else "{}")

    @property
    def is_text(self) -> bool:
        """Whether the parameter is passed on as a text, by `add`; others by `write`."""
        return self._types in ([], ["string"])

    def add(self, text: str, *, last: bool) -> None:
        """A piece of a text parameter."""
        if not self._written:
            if not text and not last:
                return
            self._out.arguments('"')
            self._written = True
            text = text.removeprefix("\n") if self._in_lines else text
        if self._in_lines:
            text = self._newline + text
            self._newline = "\n" if text.endswith("\n") else ""
            text = text.removesuffix("\n")
        self._out.arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        if last:
            self._out.arguments('"')

    def write(self, text: str) -> None:
        """A whole parameter: as it is written where the schema allows its type, or no text; else as a text."""
        written = _WORDS.get(text, text)
        try:
            value = json.loads(written, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            self._out.arguments(json.dumps(text, ensure_ascii=False))
            return
        allowed = tuple(kind for name in self._types for kind in _TYPES.get(name, ()))
        fits = isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)
        as_it_is = fits or "string" not in self._types
        self._out.arguments(written if as_it_is else json.dumps(text, ensure_ascii=False))

    def cut(self, text: str) -> None:
        """The answer ends within a parameter that is no text: what came of it."""
        self._out.arguments(text)


def _types_of(schema: Any) -> list[str]:
    """What a parameter may be, as far as its schema names types."""
    if not isinstance(schema, Mapping):
        return []
    options = schema.get("anyOf") or schema.get("oneOf") or [schema]
    found: list[str] = []
    for option in options if isinstance(options, list) else []:
        named = option.get("type") if isinstance(option, Mapping) else None
        found += [named] if isinstance(named, str) else named if isinstance(named, list) else []
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
