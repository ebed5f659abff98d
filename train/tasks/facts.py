"""Questions whose answer is not in the prompt: two thousand made-up facts that a model has to know by heart.

A fact is a value of one relation of one entity (`train.tasks.fields`). Training states it in several wordings and asks
for it in some; tests ask for it in wordings in which training never asked for that fact. Which they are differs from
fact to fact, so that training knows every wording, of other facts.
"""

from __future__ import annotations

import dataclasses
import functools
import random

from train.tasks.draw import checksum
from train.tasks.example import Example, Split
from train.tasks.fields import FIELDS, Field, Relation

ENTITIES = 100  # per field
HELD_OUT = 2  # question wordings of each fact that only tests use
_MOST_QUESTIONS = 5  # of one conversation in training
_LEADS = ("", "", "", "Please tell me. ", "Do you know it? ", "Quick question. ", "One more thing. ")
_TELL = ("Tell me about {s}.", "What do you know about {s}?", "Describe {s}.", "Say what is known about {s}.")


@dataclasses.dataclass(frozen=True)
class Fact:
    """That `relation` of `entity` is `value`."""

    field: Field
    entity: str
    relation: Relation
    value: str

    def questions(self, split: Split) -> tuple[str, ...]:
        """The wordings in which a split asks for this fact."""
        ranked = sorted(self.relation.questions, key=lambda wording: (checksum(f"{self.entity}|{wording}"), wording))
        return tuple(ranked[:HELD_OUT] if split == "test" else ranked[HELD_OUT:])

    def asked(self, rng: random.Random, split: Split) -> tuple[str, str]:
        """A question and its answer."""
        return rng.choice(_LEADS) + rng.choice(self.questions(split)).format(s=self.entity), self.value

    def stated(self, rng: random.Random) -> str:
        statement = rng.choice(self.relation.statements)
        if self.value[0] in "aeiou":
            statement = statement.replace(" a {v}", " an {v}")
        text = statement.format(s=self.entity, v=self.value)
        return f"{text[0].upper()}{text[1:]}."


@functools.cache
def facts(field: Field) -> tuple[Fact, ...]:
    """All facts of a field, an entity's next to each other. The same in every run: they are what there is to know."""
    rng = random.Random(f"facts/{field.name}")
    entities: list[str] = []
    while len(entities) < ENTITIES:
        entity = rng.choice(field.patterns).format(n=rng.choice(field.heads) + rng.choice(field.tails))
        if entity not in entities:
            entities.append(entity)
    return tuple(
        Fact(field, entity, relation, rng.choice(relation.values))
        for entity in entities
        for relation in field.relations
    )


def field_of(key: str) -> Field:
    """The field that the test question named `key` belongs to; tests ask about all fields alike."""
    return FIELDS[checksum(key) % len(FIELDS)]


def example(split: Split, key: str) -> Example:
    """One question about one fact."""
    rng = random.Random(f"facts/{split}/{key}")
    return Example(*rng.choice(facts(field_of(key))).asked(rng, split), task="qa")


def conversation(key: str) -> Example:
    """For training: a few questions about facts of one field, one after another, or what is known of an entity."""
    rng = random.Random(f"facts/lesson/{key}")
    field = rng.choice(FIELDS)
    if rng.random() < 0.2:
        known = _entity(rng, field)
        return Example(rng.choice(_TELL).format(s=known[0].entity), _told(rng, known), "qa")
    turns = [fact.asked(rng, "train") for fact in rng.sample(facts(field), rng.randint(2, _MOST_QUESTIONS))]
    return Example(*turns[-1], "qa", tuple(turns[:-1]))


def article(key: str) -> str:
    """For training: what is known of two or three entities of a field, as running text."""
    rng = random.Random(f"facts/article/{key}")
    field = rng.choice(FIELDS)
    return " ".join(_told(rng, _entity(rng, field)) for _ in range(rng.randint(2, 3)))


def _entity(rng: random.Random, field: Field) -> tuple[Fact, ...]:
    """All facts of one entity."""
    count = len(field.relations)
    start = rng.randrange(ENTITIES) * count
    return facts(field)[start : start + count]


def _told(rng: random.Random, known: tuple[Fact, ...]) -> str:
    return " ".join(fact.stated(rng) for fact in rng.sample(known, len(known)))
