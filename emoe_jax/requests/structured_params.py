"""What an answer has to match, as the caller says it. Names and meaning are vLLM's. No tensor library here."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from emoe_jax.errors import RequestError
from emoe_jax.requests.parameters import Parameters

MAX_GRAMMAR_CHARS = 2**16
"""Of a schema as JSON, of an expression or grammar, or of all choices together."""

MAX_SCHEMA_TEXT = 4 * MAX_GRAMMAR_CHARS
"""Of a schema that comes as text, which may be indented."""


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams(Parameters):
    """Exactly one of: a JSON Schema (as text or mapping), a regular expression, texts to choose from, a context-free
    grammar (Lark's notation, or EBNF with `root ::=`), any JSON object.

    Raises `RequestError` for none or several of them, and for what is too large or of another type.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    param: str = dataclasses.field(default="structured_outputs", compare=False, repr=False)
    """What the caller calls it, for error messages."""

    def __post_init__(self) -> None:
        kinds = {
            "json": self.json,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
            "json_object": self.json_object or None,
        }
        given = [kind for kind, value in kinds.items() if value is not None]
        if len(given) != 1:
            raise self.error(f"has {' and '.join(given) or 'nothing'}; expected exactly one of {', '.join(kinds)}")
        if self.json is not None:
            object.__setattr__(self, "json", self._json_text(self.json))
        for kind, text in (("regex", self.regex), ("grammar", self.grammar)):
            if text is not None and not isinstance(text, str):
                raise self.error(f"has a {kind} that is no text")
        if self.choice is not None:
            if isinstance(self.choice, str) or not all(isinstance(text, str) and text for text in self.choice):
                raise self.error("has a choice that is no list of texts with at least a character each")
            object.__setattr__(self, "choice", tuple(self.choice))
            if not self.choice:
                raise self.error("has an empty list of choices")
        if self.size > MAX_GRAMMAR_CHARS:
            raise self.error(f"has {self.size} characters; at most {MAX_GRAMMAR_CHARS} are taken")

    @property
    def size(self) -> int:
        """Characters of the schema, of the expression or grammar, or of all choices together."""
        return sum(map(len, (self.json or "", self.regex or "", self.grammar or "", *(self.choice or ()))))

    def error(self, problem: str) -> RequestError:
        """`problem` continues a sentence that begins with the parameter's name."""
        return RequestError(f"{self.param} {problem}", param=self.param)

    def _json_text(self, schema: str | Mapping[str, Any]) -> str:
        """The schema in a form that can be compared and measured."""
        if isinstance(schema, str) and len(schema) > MAX_SCHEMA_TEXT:  # parsing megabytes would stop all threads
            raise self.error(f"has {len(schema)} characters; at most {MAX_GRAMMAR_CHARS} are taken")
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            if not isinstance(parsed, Mapping):
                raise self.error("has a schema that is no JSON object")
            return json.dumps(dict(parsed), allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise self.error(f"has a schema that is no JSON: {error}") from None
