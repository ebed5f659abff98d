"""Conversing: short chats in which the assistant takes up what the user said and keeps the talk going.

A chat runs through a few subjects; each exchange has wordings of its own for both sides, filled with the same words, so
a good reply has to carry the user's words over.
"""

from __future__ import annotations

import dataclasses

from train.tasks import words
from train.tasks.draw import Draw, split_of
from train.tasks.example import Example, Split
from train.tasks.lists import read


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Wordings of a user's turn and of the three parts of a reply, each drawn on its own. `{x}` is the topic."""

    things: tuple[str, ...]
    user: tuple[str, ...]
    begin: tuple[str, ...]
    middle: tuple[str, ...]
    end: tuple[str, ...]


def _exchanges(part: str) -> tuple[Exchange, ...]:
    """`things` is a list, or the name of one of `train.tasks.words`."""
    exchanges = read("conv")[part]
    lists = (each["things"] for each in exchanges)
    found = (words.named[things] if isinstance(things, str) else things for things in lists)
    return tuple(Exchange(**each | {"things": things}) for each, things in zip(exchanges, found, strict=True))


_GREETINGS, _SUBJECTS, _FAREWELLS = map(_exchanges, ("greetings", "subjects", "farewells"))


def example(split: Split, key: str) -> Example:
    """A chat of one to three exchanges, at least one of them about some thing: the last reply is the answer."""
    draw = Draw(f"conv/{split}/{key}", split)
    exchanges = [_pick(draw, _GREETINGS)] if draw.chance(0.3) else []
    named = any(exchange.things for exchange in exchanges)
    small_talk_only = split == "train" and draw.chance(0.15)
    if not small_talk_only:
        exchanges += draw.rng.sample(_SUBJECTS, draw.rng.randint(0 if named else 1, 2))
    if draw.chance(0.2) or not exchanges:
        exchanges.append(_pick(draw, _FAREWELLS))
    turns = [_turn(draw, exchange) for exchange in exchanges]
    return Example(turns[-1][0], turns[-1][1], "conv", tuple(turns[:-1]))


def _pick(draw: Draw, exchanges: tuple[Exchange, ...]) -> Exchange:
    return exchanges[draw.rng.randrange(len(exchanges))]


def _turn(draw: Draw, exchange: Exchange) -> tuple[str, str]:
    """Both sides of an exchange. Held out: what the user says about which thing, and how the reply is put together."""
    thing, user = "", draw.one(exchange.user)
    if exchange.things:
        thing, user = next(
            pair for pair in iter(lambda: _said(draw, exchange), None) if split_of(pair[1]) == draw.split
        )
    begin, middle, end = draw.phrase(exchange.begin, exchange.middle, exchange.end)
    return user, " ".join(_fill(part, thing) for part in (begin, middle, end))


def _said(draw: Draw, exchange: Exchange) -> tuple[str, str]:
    thing = draw.noun(exchange.things)
    return thing, _fill(draw.one(exchange.user), thing)


def _fill(wording: str, thing: str) -> str:
    text = wording.format(x=thing)
    return text[0].upper() + text[1:]
