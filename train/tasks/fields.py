"""Five made-up fields of knowledge, each with names, words and wordings of its own (for `train.tasks.facts`).

`{s}` is the thing asked about and `{v}` the value. Of a relation's questions some are held out, for each fact others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from train.tasks.lists import read


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


def _field(raw: dict[str, Any]) -> Field:
    parts: dict[str, Any] = {"relations": tuple(Relation(**relation) for relation in raw["relations"])}
    return Field(**raw | parts)


FIELDS = tuple(map(_field, read("fields")))
