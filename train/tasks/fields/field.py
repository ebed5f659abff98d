"""What a field of made-up knowledge consists of."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Relation:
    """One thing to know of every entity of a field."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Field:
    """A field: an entity's name is one of `patterns` with a stem of `heads` and `tails` in place of `{n}`."""

    name: str
    patterns: tuple[str, ...]
    heads: tuple[str, ...]
    tails: tuple[str, ...]
    relations: tuple[Relation, ...]
