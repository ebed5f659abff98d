"""Why a request's body does not fit, in the library's words: `top_p is 5; expected at most 1`."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from emoe_jax.requests.request import INT32, INT64

_KINDS = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "string_too_short": "at least {min_length}",
    "string_too_long": "at most {max_length}",
    "too_short": "at least {min_length}",
    "too_long": "at most {max_length}",
}
"""What pydantic's complaints expect. Each sentence begins with what was found."""


_WORD = re.compile(r"[\w.-]{1,32}")


def describe_validation(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Message and field of pydantic's first complaint. A text is not repeated: it may be a prompt."""
    first = errors[0]
    kind, param = first["type"], field_path(first["loc"])
    if param is None:
        return "the body is no object; expected a JSON object", None
    if kind == "missing":
        return f"{param} is missing", param
    if kind in _KINDS:
        bounds = first.get("ctx", {})
        right = _KINDS[kind].format(**{name: _plain(bound) for name, bound in bounds.items()})
        if kind == "int_parsing_size" or INT64 in (bounds.get("le"), -1 - bounds.get("ge", 0)):
            right = f"an integer from {-1 - INT64} to {INT64}"
        return f"{param} {_size_or_kind(kind, first['input'])}; expected {right}", param
    reason = first["msg"].removeprefix("Value error, ")
    return f"{param}{' ' if reason.startswith(('is ', 'has ')) else ': '}{reason}", param


def field_path(location: Sequence[str | int]) -> str | None:
    """("body", "messages", 0, "content") -> "messages[0].content"; None for the body itself."""
    path = ""
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or None


def found(value: Any) -> str:
    """What a message says of a JSON value. Texts are not repeated: they may be prompts."""
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    if type(value) is int and abs(value) > INT32:
        return f"an integer beyond {64 if abs(value) > INT64 else 32} bits"
    return json.dumps(value)


def named(value: Any) -> str:
    """The same of a value that should be one of a few words: a single short word is no prompt."""
    return repr(value) if isinstance(value, str) and _WORD.fullmatch(value) else found(value)


def _size_or_kind(kind: str, value: Any) -> str:
    """`is 5`, or the size where that is at fault."""
    if kind == "literal_error":
        return f"is {named(value)}"
    if kind.endswith(("too_short", "too_long")):
        return f"has {len(value)} {'characters' if isinstance(value, str) else 'elements'}"
    return f"is {found(value)}"


def _plain(bound: Any) -> Any:
    """A bound as a caller writes it: 1 instead of 1.0."""
    return f"{bound:g}" if isinstance(bound, float) else bound
