"""Made-up facts: thousands of them, asked in wordings that training does not use for them."""

import itertools
import random
import re

import pytest

from train.tasks import examples, facts
from train.tasks.fields import FIELDS

ALL = list(itertools.chain(*(facts.facts(field) for field in FIELDS)))


def test_there_are_thousands_in_several_fields():
    assert len(ALL) >= 2000
    assert len(FIELDS) == 5
    entities = [fact.entity for fact in ALL]
    assert len(set(entities)) == len(ALL) // 4  # no name belongs to two fields


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_field_has_words_of_its_own(field):
    def words(other):
        return set(itertools.chain(*(relation.values for relation in other.relations)))

    others = set(itertools.chain(*(words(other) for other in FIELDS if other is not field)))
    assert len(words(field) & others) < 0.1 * len(words(field))


def test_a_fact_has_one_value_that_no_other_fact_gives_away():
    for field in FIELDS:
        for relation in field.relations:
            values = [fact.value for fact in facts.facts(field) if fact.relation is relation]
            assert len(values) == facts.ENTITIES
            assert max(values.count(value) for value in values) < 0.13 * len(values)


def test_test_wordings_of_a_fact_are_not_trained_on():
    for fact in ALL:
        trained, tested = set(fact.questions("train")), set(fact.questions("test"))
        assert not trained & tested
        assert trained | tested == set(fact.relation.questions)
        assert len(tested) == facts.HELD_OUT
    relation = FIELDS[0].relations[0]
    held_out = {fact.questions("test") for fact in facts.facts(FIELDS[0]) if fact.relation is relation}
    assert len(held_out) > 10  # every wording is known, of other facts


def test_no_training_conversation_holds_a_test_question():
    held_out = {wording.format(s=fact.entity) for fact in ALL for wording in fact.questions("test")}
    asked = {wording.format(s=fact.entity) for fact in ALL for wording in fact.questions("train")}
    seen = set()
    for index in range(3000):
        lesson = facts.conversation(f"0/{index}")
        for text in (*itertools.chain(*lesson.history), lesson.prompt, lesson.answer, facts.article(str(index))):
            seen |= set(re.findall(r"[A-Z][^.?]*\?", text))
    assert len(seen & asked) > 3000
    assert not seen & held_out


def test_the_answer_is_not_in_the_prompt():
    tested = examples("facts", "test", 0, 400)
    assert {example.answer in example.prompt for example in tested} == {False}
    assert {example.task for example in tested} == {"qa"}
    assert tested == examples("facts", "test", 0, 400)
    fields = [facts.field_of(f"0/{index}").name for index in range(400)]
    assert min(fields.count(field.name) for field in FIELDS) > 50
    for index, example in enumerate(tested):
        entities = {fact.entity for fact in ALL if fact.field.name == fields[index]}
        assert any(entity in example.prompt for entity in entities)


def test_statements_name_entity_and_value_in_several_wordings():
    rng = random.Random(0)
    fact = ALL[0]
    stated = {fact.stated(rng) for _ in range(50)}
    assert len(stated) == len(fact.relation.statements) == 5
    assert all(fact.entity in text and fact.value in text for text in stated)
