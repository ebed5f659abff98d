"""`oneOf` in JSON Schemas as `anyOf`, which means the same where no value matches two branches.

Pydantic writes discriminated unions this way. Branches exclude each other by their types, by their constants, or by a
required property that excludes the other's. A property that `discriminator` names counts as required, and is made so.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any

MAX_BRANCHES = 256
MAX_DEPTH = 16
"""References and unions that are followed to see whether two branches exclude each other."""

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_SINGLE = (
    "items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then", "else",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_TYPES: dict[type, str] = {str: "string", bool: "boolean", type(None): "null", dict: "object", list: "array"}


def without_one_of(text: str) -> str:
    """The schema with `anyOf` for each `oneOf`. Raises `ValueError` where two branches may both match."""
    if '"oneOf"' not in text:
        return text
    root = json.loads(text)
    try:
        _Rewriter(root).rewritten(root)  # makes discriminators required, also in definitions that come before their use
        return json.dumps(_Rewriter(root).rewritten(root))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Rewriter:
    def __init__(self, root: Any):
        self._root = root

    def rewritten(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return [self.rewritten(part) for part in schema] if isinstance(schema, list) else schema
        branches = schema.get("oneOf")
        if isinstance(branches, list):
            self._check(branches, schema)
        result = {}
        for name, value in schema.items():
            if name in _MAPS and isinstance(value, dict):
                value = {key: self.rewritten(part) for key, part in value.items()}
            elif name in _LISTS or name in _SINGLE:
                value = self.rewritten(value)
            result[name] = value
        if isinstance(branches, list):
            result.pop("discriminator", None)
            union = result.pop("oneOf")
            if "anyOf" in result:
                result["allOf"] = [*result.get("allOf", []), {"anyOf": union}]
            else:
                result["anyOf"] = union
        return result

    def _check(self, branches: list[Any], schema: Mapping[str, Any]) -> None:
        """Raise `ValueError` where two branches of the schema may both match."""
        if len(branches) > MAX_BRANCHES:
            raise ValueError(f"a oneOf has {len(branches)} branches; at most {MAX_BRANCHES} are taken")
        if (discriminator := _discriminator(schema)) is not None:
            for branch in branches:
                self._require(branch, discriminator, 0)
        whole = [self._within(branch, schema) for branch in branches]
        for (i, one), (j, other) in itertools.combinations(enumerate(whole), 2):
            if not self._exclude(one, other, 0):
                raise ValueError(
                    f"branches {i} and {j} of a oneOf may both match; use anyOf, or give each a required property "
                    "with a const of its own"
                )

    def _require(self, branch: Any, name: str, depth: int) -> None:
        """Make the property a required one, in the branch or in what it refers to."""
        branch = self._resolved(branch)
        if depth > MAX_DEPTH or not isinstance(branch, dict):
            return
        if name in branch.get("properties", {}):
            branch["required"] = list(dict.fromkeys([*branch.get("required", []), name]))
        for part in (*branch.get("oneOf", []), *branch.get("anyOf", [])):
            self._require(part, name, depth + 1)

    def _resolved(self, schema: Any) -> Any:
        """What a reference within the schema leads to."""
        for _ in range(MAX_DEPTH):
            reference = schema.get("$ref") if isinstance(schema, dict) else None
            if not isinstance(reference, str) or not reference.startswith("#"):
                return schema
            target = self._root
            for part in reference[1:].split("/")[1:]:
                key = part.replace("~1", "/").replace("~0", "~")
                target = target.get(key) if isinstance(target, dict) else None
            schema = target
        return None

    def _within(self, branch: Any, outer: Mapping[str, Any]) -> Any:
        """A branch with the type and the required properties of the schema around it, which hold for it too."""
        branch = self._resolved(branch)
        if not isinstance(branch, dict):
            return branch
        whole = dict(branch)
        if _types(branch) is None and "type" in outer:
            whole["type"] = outer["type"]
        if required := _required(branch) | _required(outer):
            whole["required"] = sorted(required)
        return whole

    def _exclude(self, one: Any, other: Any, depth: int) -> bool:
        """Whether it is certain that no value matches both."""
        one, other = self._resolved(one), self._resolved(other)
        if depth > MAX_DEPTH or not isinstance(one, dict) or not isinstance(other, dict):
            return False
        for left, right in ((one, other), (other, one)):
            for union in ("oneOf", "anyOf"):
                parts = left.get(union)
                if not isinstance(parts, list) or not parts:
                    continue
                if all(self._exclude(self._within(part, left), right, depth + 1) for part in parts):
                    return True
        types, others = _types(one), _types(other)
        if types is not None and others is not None and not _expanded(types) & _expanded(others):
            return True
        values, rest = _values(one), _values(other)
        if values is not None and rest is not None:
            return not any(_equal(a, b) for a in values for b in rest)
        shared = set(_properties(one)) & set(_properties(other)) & _required(one) & _required(other)
        if types != {"object"} or others != {"object"}:
            return False
        return any(self._exclude(_properties(one)[n], _properties(other)[n], depth + 1) for n in sorted(shared))


def _discriminator(schema: Mapping[str, Any]) -> str | None:
    discriminator = schema.get("discriminator")
    name = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    return name if isinstance(name, str) else None


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _required(schema: Mapping[str, Any]) -> set[str]:
    required = schema.get("required")
    return {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The only values that match, where they are listed."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _types(schema: Mapping[str, Any]) -> set[str] | None:
    """JSON's types of values that may match; None for any."""
    if (values := _values(schema)) is not None:
        return {_TYPES.get(type(value), "number") for value in values}
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return {kind for kind in kinds if isinstance(kind, str)} if isinstance(kinds, list) else None


def _expanded(types: set[str]) -> set[str]:
    """An integer is a number."""
    return {"number" if kind == "integer" else kind for kind in types}


def _equal(one: Any, other: Any) -> bool:
    """As JSON has it: 1 is 1.0, and true is not 1. Lists and objects count as equal unless they surely differ."""
    if isinstance(one, dict | list) and isinstance(other, dict | list):
        return type(one) is type(other)
    return one == other and isinstance(one, bool) == isinstance(other, bool)
