"""Question answering: a short context of facts about people or companies, and a question that one of them answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from train.tasks import words
from train.tasks.draw import Draw
from train.tasks.example import Example, Split
from train.tasks.lists import read

_FEWEST_FACTS, _MOST_FACTS = 3, 5
_VERBS = ("Answer", "Reply to", "Give the answer to", "Work out the answer to", "Find the answer to", "Respond to")
_OBJECTS = ("the question", "this question", "the question below", "the following question")
_SOURCES = (
    "using the context",
    "from the context",
    "based on the passage",
    "with words from the text",
    "by reading the passage",
    "from what the text says",
)
_LAYOUTS = (
    "{instruction}.\nContext: {context}\nQuestion: {question}",
    "{context}\n{instruction}: {question}",
    "Context: {context}\n{instruction}.\nQ: {question}",
    "{instruction}.\nPassage: {context}\nQuestion: {question}",
    "Read the passage. {context}\n{instruction}.\nQuestion: {question}",
)
_LEADS = (
    "",
    "",
    "",
    "These days ",
    "As far as we know, ",
    "According to the notes, ",
    "It is known that ",
    "Today ",
    "Of course, ",
)
_ASKS = ("", "", "", "Please tell me: ", "Do you know: ", "Tell me, ", "One thing: ", "I wonder: ")


@dataclasses.dataclass(frozen=True)
class Relation:
    """A property of a person or company: how it is stated and asked, `{s}` being its bearer and `{v}` its value."""

    value: Callable[[Draw], str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _vehicle(draw: Draw) -> str:
    return f"{draw.one(words.COLOURS)} {draw.one(words.VEHICLES)}"


def _year(draw: Draw) -> str:
    return str(draw.rng.randint(1850, 2020))


_MADE: dict[str, Callable[[Draw], str]] = {"vehicle": _vehicle, "person": Draw.person, "year": _year}
"""Values that are put together; all others are nouns of a list of `train.tasks.words`."""


def _value(name: str) -> Callable[[Draw], str]:
    return _MADE[name] if name in _MADE else lambda draw: draw.noun(words.named[name])


def _relations(bearer: str) -> tuple[Relation, ...]:
    return tuple(Relation(**each | {"value": _value(each["value"])}) for each in read("qa")[bearer])


PERSON, COMPANY = _relations("person"), _relations("company")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def conversation(split: Split, key: str, turns: int, rivals: bool = False, coined: float = 0.0) -> Example:
    """A passage with `turns` questions about it: all but the last, with their answers, are the example's history.

    A passage states each relation once, of whomever it is about; with `rivals` it states the same relations of two
    bearers, so that only the name in the question tells which value is asked for. `coined` is the share of nouns that
    are made up.
    """
    draw = Draw(f"qa/{split}/{key}", split, coined)
    relations, subject = (PERSON, draw.person) if draw.chance(0.65) else (COMPANY, draw.company)
    facts: list[tuple[str, Relation, str]] = []  # bearer, relation, value
    if rivals:
        pair = draw.several(subject, 2)
        for relation in draw.rng.sample(relations, 2):
            values = draw.several(lambda relation=relation: relation.value(draw), 2)
            facts += [(bearer, relation, value) for bearer, value in zip(pair, values, strict=True)]
        draw.rng.shuffle(facts)
    else:
        subjects = draw.several(subject, draw.rng.randint(1, 3))
        chosen = draw.rng.sample(relations, draw.rng.randint(_FEWEST_FACTS, _MOST_FACTS))
        facts = [(draw.one(subjects), relation, relation.value(draw)) for relation in chosen]
    stated = []
    for bearer, relation, value in facts:
        lead, statement = draw.phrase(_LEADS, relation.statements)
        stated.append(_sentence(lead + statement.format(s=bearer, v=value)) + ".")
    asked = []
    for bearer, relation, value in draw.rng.sample(facts, min(turns, len(facts))):
        ask, question = draw.phrase(_ASKS, relation.questions)
        asked.append((_sentence(ask + question.format(s=bearer)), value))
    instruction = " ".join(draw.phrase(_VERBS, _OBJECTS, _SOURCES))
    first = draw.one(_LAYOUTS).format(instruction=instruction, context=" ".join(stated), question=asked[0][0])
    history = [(first, asked[0][1]), *asked[1:]]
    return Example(history[-1][0], history[-1][1], "qa", tuple(history[:-1]))


def example(split: Split, key: str) -> Example:
    """One question about one passage; the answer is a span of the passage."""
    return conversation(split, key, turns=1)


def rival_example(split: Split, key: str) -> Example:
    """The same where the name decides: harder, and measured apart from the task."""
    return conversation(split, key, turns=1, rivals=True)
