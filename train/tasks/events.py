"""The kinds of events that the made-up news is about, with the wordings of each.

Slots: `{a}` who it is about, `{b}` a second party, `{d}` the day, `{n}` a number, `{x}` a thing.
"""

from __future__ import annotations

import dataclasses

from train.tasks import words
from train.tasks.lists import read


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of event: who takes part, and the ways to report it."""

    name: str
    a: str  # which names fill {a} and {b}: "company", "person" or "city"
    b: str
    things: tuple[str, ...]
    headlines: tuple[str, ...]
    leads: tuple[str, ...]
    reasons: tuple[str, ...]
    summary: str


KINDS = tuple(Kind(**kind | {"things": words.named[kind["things"]]}) for kind in read("events"))
