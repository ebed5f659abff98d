"""A call written as a JSON object, `{"name": ..., "arguments": {...}}`, read as it comes."""

import json
import re
from collections.abc import Callable, Collection

from serve.parsing.events import Collector

_SPACES = " \t\r\n"
_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}\[\]<]')
_LITERAL_ENDS = frozenset(",}]" + _SPACES)
_ARGUMENTS = ("arguments", "parameters")


class Nested:
    """Finds the end of an object or list, by its strings and brackets alone: what is between them may be wrong.

    `closer` ends it outside of strings, too: the model has forgotten a bracket.
    """

    def __init__(self, closer: str):
        self.ended = False
        self._closer = closer
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def scan(self, text: str, at: int) -> int:
        """How far the text from `at` on belongs to it: not all where it has ended, or where a closer may begin."""
        while at < len(text):
            if self._is_escaped:
                self._is_escaped, at = False, at + 1
                continue
            match = (_IN_STRING if self._in_string else _OUTSIDE).search(text, at)
            if match is None:
                return len(text)
            mark, at = match[0], match.end()
            if self._in_string:
                self._is_escaped = mark == "\\"
                self._in_string = self._is_escaped
            elif mark == '"':
                self._in_string = True
            elif mark == "<":
                if self._closer and text.startswith(self._closer, match.start()):
                    self.ended = True
                    return match.start()
                if self._closer and self._closer.startswith(text[match.start() :]):
                    return match.start()
            else:
                self._depth += 1 if mark in "{[" else -1
                if self._depth == 0:
                    self.ended = True
                    return at
        return at


class JsonCall:
    """One call. It counts from the first character of its arguments on: what is wrong before makes it no call.

    `status` becomes "done" behind its last brace, and "failed" where it is no call; `raw` is what it has read then.
    Arguments are passed on as the model writes them. `tools` are the names that may be called.
    """

    def __init__(self, tools: Collection[str], out: Collector, closer: str = ""):
        self.status = "open"
        self.is_call = False
        self.raw = ""
        self._tools = tools
        self._out = out
        self._closer = closer
        self._name: str | None = None
        self._held: list[str] | None = None  # arguments whose tool is not known yet
        self._has_arguments = False
        self._key = ""
        self._part = ""  # a string or literal that is being read
        self._nested: Nested | None = None
        self._state: Callable[[str, int], int] = self._start

    def feed(self, text: str) -> int:
        """Read on; returns how much was read. The rest has to come again, with more behind it."""
        at = 0
        while at < len(text) and self.status == "open":
            before, state = at, self._state
            at = self._state(text, at)
            if at == before and self._state == state:
                break  # it waits for more
        if not self.is_call:
            self.raw += text[:at]
        return at

    def finish(self, rest: str) -> None:
        """The answer ends within the call: what has not been read is passed on as it is."""
        self._out.arguments(rest)

    def _fail(self, at: int) -> int:
        if self.is_call:
            self.status = "done"
        else:
            self.status = "failed"
        return at

    def _start(self, text: str, at: int) -> int:
        if text[at] in _SPACES:
            return at + 1
        if text[at] != "{":
            return self._fail(at)
        self._state = self._before_key
        return at + 1

    def _before_key(self, text: str, at: int) -> int:
        if text[at] in _SPACES:
            return at + 1
        if text[at] == "}":
            return self._end(at)
        if text[at] != '"':
            return self._fail(at)
        return self._begin_string(text, at, self._key_read)

    def _begin_string(self, text: str, at: int, then: Callable[[int], int]) -> int:
        self._part = text[at]

        def read(text: str, at: int) -> int:
            start, escaped = at, self._part.endswith("\\") and _is_escaping(self._part)
            while at < len(text):
                if escaped:
                    escaped, at = False, at + 1
                    continue
                match = _IN_STRING.search(text, at)
                if match is None:
                    at = len(text)
                    break
                at = match.end()
                if match[0] == "\\":
                    escaped = True
                    continue
                self._part += text[start:at]
                return then(at)
            self._part += text[start:at]
            return at

        self._state = read
        return at + 1

    def _key_read(self, at: int) -> int:
        try:
            self._key = json.loads(self._part, strict=False)
        except ValueError:
            return self._fail(at)
        self._state = self._before_colon
        return at

    def _before_colon(self, text: str, at: int) -> int:
        if text[at] in _SPACES:
            return at + 1
        if text[at] != ":":
            return self._fail(at)
        self._state = self._before_value
        return at + 1

    def _before_value(self, text: str, at: int) -> int:
        character = text[at]
        if character in _SPACES:
            return at + 1
        is_arguments = self._key in _ARGUMENTS and not self._has_arguments
        if self._key == "name":
            return self._begin_string(text, at, self._name_read) if character == '"' else self._fail(at)
        if is_arguments and character == "{":
            verdict = begins_object(text[at:])
            if verdict is False:
                return self._fail(at)
            if verdict:
                self._begin_arguments()
            return at
        if is_arguments and character == '"':
            return self._begin_string(text, at, self._arguments_read)
        if is_arguments and character != "n":
            return self._fail(at)
        if character == '"':
            return self._begin_string(text, at, self._ignore)
        if character in "{[":
            self._nested, self._state = Nested(self._closer), self._skip
            return at
        self._part, self._state = "", self._literal
        return at

    def _name_read(self, at: int) -> int:
        try:
            name = json.loads(self._part, strict=False)
        except ValueError:
            return self._fail(at)
        if self._name is not None or name not in self._tools:
            return self._fail(at)
        self._name = name
        if self._held is not None:
            self._call("".join(self._held))
            self._held = None
        self._state = self._after_value
        return at

    def _arguments_read(self, at: int) -> int:
        """They came as a string of JSON."""
        try:
            arguments = json.loads(self._part, strict=False)
            if not isinstance(json.loads(arguments), dict):
                return self._fail(at)
        except ValueError:
            return self._fail(at)
        self._begin_arguments()
        self._argue(arguments)
        self._nested, self._state = None, self._after_value
        return at

    def _ignore(self, at: int) -> int:
        self._state = self._after_value
        return at

    def _literal(self, text: str, at: int) -> int:
        start = at
        while at < len(text) and text[at] not in _LITERAL_ENDS:
            at += 1
        self._part += text[start:at]
        if at == len(text):
            return at
        try:
            json.loads(self._part)
        except ValueError:
            return self._fail(at)
        if self._key in _ARGUMENTS and self._part != "null":
            return self._fail(at)
        self._state = self._after_value
        return at

    def _skip(self, text: str, at: int) -> int:
        assert self._nested is not None
        at = self._nested.scan(text, at)
        if self._nested.ended:
            if text.startswith(self._closer or "\0", at):
                return self._fail(at)
            self._state = self._after_value
        return at

    def _begin_arguments(self) -> None:
        self._has_arguments = True
        self._nested, self._state = Nested(self._closer), self._read_arguments
        if self._name is None:
            self._held = []
        else:
            self._call("")

    def _call(self, arguments: str) -> None:
        assert self._name is not None
        self.is_call, self.raw = True, ""
        self._out.call(self._name)
        self._out.arguments(arguments)

    def _argue(self, text: str) -> None:
        if self._held is not None:
            self._held.append(text)
        else:
            self._out.arguments(text)

    def _read_arguments(self, text: str, at: int) -> int:
        assert self._nested is not None
        start, at = at, self._nested.scan(text, at)
        self._argue(text[start:at])
        if self._nested.ended:
            if self._closer and text.startswith(self._closer, at):
                return self._fail(at)
            self._state = self._after_value
        return at

    def _after_value(self, text: str, at: int) -> int:
        if text[at] in _SPACES:
            return at + 1
        if text[at] == "}":
            return self._end(at)
        if text[at] != ",":
            return self._fail(at)
        self._state = self._before_key
        return at + 1

    def _end(self, at: int) -> int:
        if self._name is None:
            return self._fail(at)
        if not self.is_call:
            self._call("{}")
        self.status = "done"
        return at + 1


def begins_object(text: str) -> bool | None:
    """Whether this is the beginning of a JSON object: a brace, and a key or the other brace. None when it is short."""
    if not text:
        return None
    if text[0] != "{":
        return False
    inside = text[1:].lstrip()
    return inside[0] in '"}' if inside else None


def _is_escaping(part: str) -> bool:
    """Whether the backslash at the end of a string's beginning escapes what comes next."""
    return (len(part) - len(part.rstrip("\\"))) % 2 == 1
