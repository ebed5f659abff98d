"""Grammars that hold a model to calls of tools whose arguments fit their schemas, in Lark's notation."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from emoe_jax.requests.grammar import SPACING
from emoe_jax.requests.one_of import without_one_of
from serve.parsing import deepseek, harmony, mistral, tagged_calls
from serve.parsing.forms import AnswerForm, Tools

MAX_CALLS = 16
"""Of one answer that has to call a tool. A model that may go on calling may never end."""

SpecialId = Callable[[str], int | None]
"""The id of a special token; None for what is written as text."""

ANY_ARGUMENTS: Mapping[str, Any] = {"type": "object"}


class UnfitSchema(ValueError):
    """No grammar can have the schema of a tool's arguments."""

    def __init__(self, tool: str, reason: str):
        super().__init__(reason)
        self.tool = tool


class CallGrammar:
    """Writes grammars for one form of calls: "hermes", "mistral", "deepseek" or "harmony". `tools` are the schemas that
    arguments have to match, by name. Without `parallel`, an answer has one call.

    `opened` says that the prompt has begun the thoughts. Raises `UnfitSchema`.
    """

    def __init__(
        self, form: AnswerForm, tools: Tools, special_id: SpecialId, *, opened: bool = False, parallel: bool = True
    ):
        self._form = form
        self._thoughts = form.thought_tags
        self._opened = self._thoughts is not None and opened
        self._special_id = special_id
        self._more = MAX_CALLS - 1 if parallel else 0
        self._is_list = form.calls == "mistral" and special_id(mistral.ARGUMENTS) is None
        self._opens = {"hermes": tagged_calls.OPEN, "deepseek": deepseek.OPEN}.get(form.calls, mistral.OPEN)
        self._opening = self._tag(self._opens)
        self._names = list(tools)
        self._arguments = [
            f"arguments_{i}: %json {arguments_schema(name, schema)}" for i, (name, schema) in enumerate(tools.items())
        ]

    def forced(self) -> str:
        """Of answers that call tools, after thoughts if the model has any."""
        if self._form.calls == "harmony":
            return self._grammar(f"thought* {self._harmony_call()}", self._harmony_message("thought", "analysis"))
        between = '"\\n" ' if self._form.calls == "hermes" else ""
        more = "" if self._is_whole else self._repeated(f"{between}{self._opening} call")
        start = f"{self._opening} call{more}"
        if self._thoughts is None:
            return self._grammar(start, *self._call())
        begin, end = self._thoughts
        thoughts = 'thoughts ("\\n\\n" | "\\n")?'
        thoughts = thoughts if self._opened else f"({self._tag(begin)} {thoughts})?"
        return self._grammar(f"{thoughts} {start}", self._until("thoughts", end), *self._call())

    def free(self) -> str:
        """Of answers that say what they like, and whose calls fit."""
        if self._form.calls == "harmony":
            final = f"{self._tag(harmony.CHANNEL)} {_text('final')} {self._tag(harmony.MESSAGE)} TEXT"
            before = self._harmony_message("message", "analysis", "commentary")
            return self._grammar(f"message* ({final} | {self._harmony_call()})", before)
        start, begin = f"(begin call){{0,{self._more + 1}}} TEXT", self._until("begin", self._opens)
        if self._thoughts is None or not self._opened:
            return self._grammar(start, begin, *self._call())
        return self._grammar(f"thoughts {start}", self._until("thoughts", self._thoughts[1]), begin, *self._call())

    def _grammar(self, start: str, *rules: str) -> str:
        return "\n".join((f"start: {start}", *rules, *self._arguments, "TEXT: /(.|\\n)*/", ""))

    @property
    def _is_whole(self) -> bool:
        """Whether one opening tag holds all calls."""
        return self._is_list or self._form.calls == "deepseek"

    def _call(self) -> list[str]:
        """The rules of what stands behind the tag that begins a call, or a list of them."""
        if self._form.calls == "hermes":
            return [f'call: "\\n" ({self._objects()}) "\\n" {self._tag(tagged_calls.CLOSE)}']
        if self._form.calls == "deepseek":
            more = self._repeated('"\\n"? each')
            return [f"call: each{more} {self._tag(deepseek.CLOSE)}", f"each: {self._deepseek_call()}"]
        if self._is_list:
            more = self._repeated('", " object')
            return [f'call: "[" object{more} "]"', f"object: {self._objects()}"]
        return [f"call: {self._each(lambda name: f'{_text(name)} {self._tag(mistral.ARGUMENTS)}')}"]

    def _repeated(self, rule: str) -> str:
        return f" ({rule}){{0,{self._more}}}" if self._more else ""

    def _objects(self) -> str:
        return self._each(lambda name: _text(f'{{"name": {json.dumps(name)}, "arguments": '), ' "}"')

    def _each(self, head: Callable[[str], str], tail: str = "") -> str:
        return " | ".join(f"{head(name)} arguments_{i}{tail}" for i, name in enumerate(self._names))

    def _deepseek_call(self) -> str:
        """Both forms, whichever the model has learnt: the name behind the separator or before it."""
        separator = self._tag(deepseek.SEPARATOR)
        fenced = self._each(
            lambda name: f"{_text(deepseek.FUNCTION)} {separator} {_text(name + deepseek.FENCE)}",
            f" {_text(deepseek.END_FENCE)}",
        )
        bare = self._each(lambda name: f"{_text(name)} {separator}")
        return f"{self._tag(deepseek.CALL)} ({fenced} | {bare}) {self._tag(deepseek.END_CALL)}"

    def _harmony_call(self) -> str:
        kind = f"{self._tag(harmony.CONSTRAIN)} {_text('json')} {self._tag(harmony.MESSAGE)}"
        calls = self._each(lambda name: f"{_text(f'commentary to=functions.{name} ')} {kind}")
        return f"{self._tag(harmony.CHANNEL)} ({calls})"

    def _harmony_message(self, rule: str, *channels: str) -> str:
        end = f"{self._tag(harmony.END)} {self._tag(harmony.START)} {_text('assistant')}"
        named = " | ".join(map(_text, channels))
        return f"{rule}: {self._tag(harmony.CHANNEL)} ({named}) {self._tag(harmony.MESSAGE)} TEXT {end}"

    def _until(self, rule: str, tag: str) -> str:
        """Text up to the first of a tag, which is part of it."""
        lazy = "[lazy]" if self._special_id(tag) is None else ""
        return f"{rule}{lazy}: TEXT {self._tag(tag)}"

    def _tag(self, tag: str) -> str:
        token_id = self._special_id(tag)
        return _text(tag) if token_id is None else f"<[{token_id}]>"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def arguments_schema(tool: str, schema: Mapping[str, Any]) -> str:
    """The schema of a tool's arguments, which are an object, in the spacing of all JSON that the server asks for.

    Raises `UnfitSchema`.
    """
    given = {"type": "object", **schema, "x-guidance": SPACING}
    try:
        return without_one_of(json.dumps(given, allow_nan=False))
    except ValueError as error:
        raise UnfitSchema(tool, str(error)) from None
