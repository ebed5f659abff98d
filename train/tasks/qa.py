"""Question answering: a short context of facts about people or companies, and a question that one of them answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from train.tasks import words
from train.tasks.draw import Draw
from train.tasks.example import Example, Split

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


def _from(nouns: tuple[str, ...]) -> Callable[[Draw], str]:
    return lambda draw: draw.noun(nouns)


PERSON = (
    Relation(
        _from(words.CITIES),
        (
            "{s} lives in {v}",
            "{s} has a home in {v}",
            "{s} settled in {v}",
            "the home of {s} is in {v}",
        ),
        (
            "where does {s} live?",
            "in which city does {s} live?",
            "what city is the home of {s} in?",
            "which city is {s} living in?",
        ),
    ),
    Relation(
        _from(words.PROFESSIONS),
        (
            "{s} works as a {v}",
            "{s} earns money as a {v}",
            "the job of {s} is {v}",
            "{s} is employed as a {v}",
            "by trade {s} is a {v}",
        ),
        (
            "what is the job of {s}?",
            "what does {s} work as?",
            "what is {s} by trade?",
            "which profession does {s} have?",
        ),
    ),
    Relation(
        _from(words.FOODS),
        (
            "{s} loves to eat {v}",
            "the favourite food of {s} is {v}",
            "{s} eats {v} every day",
            "for lunch {s} always has {v}",
        ),
        (
            "what does {s} love to eat?",
            "what is the favourite food of {s}?",
            "which food does {s} like?",
            "what does {s} eat?",
        ),
    ),
    Relation(
        _from(words.ANIMALS),
        ("{s} owns a {v}", "{s} has a {v} as a pet", "the pet of {s} is a {v}", "at home {s} keeps a {v}"),
        (
            "which animal does {s} own?",
            "what pet does {s} have?",
            "what animal does {s} keep?",
            "what is the pet of {s}?",
        ),
    ),
    Relation(
        _from(words.INSTRUMENTS),
        ("{s} plays the {v}", "{s} practises the {v} daily", "in the band {s} plays the {v}", "{s} is good at the {v}"),
        ("which instrument does {s} play?", "what does {s} play in the band?", "what instrument does {s} practise?"),
    ),
    Relation(
        _from(words.LANGUAGES),
        ("{s} speaks {v}", "{s} is learning {v}", "the mother tongue of {s} is {v}", "{s} talks to friends in {v}"),
        (
            "which language does {s} speak?",
            "what is the language of {s}?",
            "what does {s} speak?",
            "which language does {s} know?",
        ),
    ),
    Relation(
        _from(words.SUBJECTS),
        ("{s} studies {v}", "{s} has a degree in {v}", "at university {s} took {v}", "the field of {s} is {v}"),
        (
            "what does {s} study?",
            "which subject does {s} study?",
            "what is the field of {s}?",
            "what is the degree of {s} in?",
        ),
    ),
    Relation(
        _from(words.SPORTS),
        ("{s} is a fan of {v}", "on weekends {s} does {v}", "the sport of {s} is {v}", "{s} spends the weekend on {v}"),
        (
            "which sport does {s} do?",
            "what is the sport of {s}?",
            "what is {s} a fan of?",
            "what does {s} do on weekends?",
        ),
    ),
    Relation(
        lambda draw: f"{draw.one(words.COLOURS)} {draw.one(words.VEHICLES)}",
        ("{s} drives a {v}", "{s} goes to work in a {v}", "{s} bought a {v}", "{s} travels by {v}"),
        (
            "what does {s} drive?",
            "which vehicle does {s} have?",
            "what does {s} travel by?",
            "how does {s} go to work?",
        ),
    ),
    Relation(
        _from(words.MONTHS),
        ("{s} was born in {v}", "the birthday of {s} is in {v}", "{s} has a birthday in {v}"),
        ("when was {s} born?", "in which month is the birthday of {s}?", "which month was {s} born in?"),
    ),
)
COMPANY = (
    Relation(
        _from(words.CITIES),
        (
            "{s} is based in {v}",
            "{s} has its office in {v}",
            "the headquarters of {s} are in {v}",
        ),
        (
            "where is {s} based?",
            "in which city is {s} based?",
            "where are the headquarters of {s}?",
            "which city is home to {s}?",
        ),
    ),
    Relation(
        lambda draw: draw.person(),
        ("{s} is led by {v}", "the head of {s} is {v}", "the chief of {s} is {v}", "{s} has as its head {v}"),
        ("who leads {s}?", "who is the head of {s}?", "who runs {s}?", "who is the chief of {s}?"),
    ),
    Relation(
        _from(words.PRODUCTS),
        ("{s} makes {v}", "{s} sells {v}", "{s} is known for its {v}", "the main product of {s} is {v}"),
        ("what does {s} make?", "what does {s} sell?", "what is the main product of {s}?", "what is {s} known for?"),
    ),
    Relation(
        lambda draw: str(draw.rng.randint(1850, 2020)),
        ("{s} was founded in {v}", "{s} started in {v}", "the year {s} began is {v}", "{s} opened its doors in {v}"),
        (
            "when was {s} founded?",
            "in which year did {s} start?",
            "when did {s} begin?",
            "what year was {s} founded in?",
        ),
    ),
    Relation(
        _from(words.WEEKDAYS),
        ("{s} holds its meeting on {v}", "the staff of {s} meet on {v}", "{s} is closed on {v}"),
        ("on which day does {s} hold its meeting?", "which day do the staff of {s} meet on?", "when is {s} closed?"),
    ),
)


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
