"""The task generators: deterministic, disjoint between splits, answers that follow from the prompts."""

import collections
import itertools
import re

import pytest

from train.tasks import TASKS, chitchat, clsfy, comp, events, examples, qa, stories, words
from train.tasks.draw import Draw, combinations, proper_nouns, split_of

COUNT = 400


def everything(example):
    return (*example.history, example.prompt)


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_examples(task):
    first = examples(task, "test", 3, 20)
    assert first == examples(task, "test", 3, 20)
    assert first[:5] == examples(task, "test", 3, 5)
    assert first != examples(task, "test", 4, 20)
    assert all(example.task == task and example.answer for example in first)


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_is_in_both_splits(task):
    trained = {everything(example) for seed in range(3) for example in examples(task, "train", seed, COUNT)}
    tested = {everything(example) for example in examples(task, "test", 0, COUNT)}
    assert not trained & tested
    assert len(tested) > 0.9 * COUNT


def test_unknown_task_and_split_are_named():
    with pytest.raises(ValueError, match="unknown task 'poem'"):
        examples("poem", "test", 0, 1)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        examples("qa", "dev", 0, 1)  # pyright: ignore[reportArgumentType]


def test_full_names_are_held_out():
    pairs = {
        split: {Draw(f"names/{split}/{index}", split).person() for index in range(2000)} for split in ("train", "test")
    }
    assert not pairs["train"] & pairs["test"]
    assert len(pairs["train"]) > 1500
    assert {split_of(name.split()[-1]) for name in pairs["test"] if name.split()[-1] not in words.SURNAMES} == {"test"}


def test_some_nouns_never_occur_in_training():
    unseen = set(proper_nouns(words.CITIES, seen=False))
    cities = {split: [Draw(f"{split}/{index}", split).city() for index in range(1000)] for split in ("train", "test")}
    assert unseen
    assert not unseen & set(cities["train"])
    assert unseen & set(cities["test"])


def test_phrase_combinations_are_held_out():
    parts = (("a", "b", "b", "c"), ("x", "y", "z"))
    train, test = set(combinations(parts, "train")), set(combinations(parts, "test"))
    assert not train & test
    assert train | test == set(itertools.product(*parts))
    assert len(test) == 1  # a fifth of nine, rounded down
    with pytest.raises(ValueError, match="4 combinations are too few"):
        combinations((("a", "b"), ("x", "y")), "test")


def test_qa_answers_are_spans_of_the_context():
    for example in examples("qa", "test", 0, COUNT):
        assert example.answer in example.prompt
    conversation = qa.conversation("train", "0", turns=3)
    context = conversation.history[0][0]
    assert all(answer in context for _, answer in conversation.history)


def test_qa_has_one_answer():
    """No bearer of a property has two values for it: otherwise a question could be answered in two ways."""
    for example in examples("qa", "train", 0, COUNT):
        where = re.findall(r"(\w+ \w+) (?:lives in|settled in|has a home in) (\w+)", example.prompt)
        assert max(collections.Counter(name for name, _ in where).values(), default=0) <= 1


@pytest.mark.parametrize(("task", "answers"), [("clsfy", set(clsfy.LABELS)), ("comp", {"yes", "no"})])
def test_labels_are_balanced(task, answers):
    counts = collections.Counter(example.answer for example in examples(task, "test", 0, 900))
    assert set(counts) == answers
    assert min(counts.values()) > 0.8 * 900 / len(answers)


def test_a_summary_says_what_the_article_says():
    for index in range(200):
        draw = Draw(f"story/{index}", "test")
        story = stories.story(draw)
        article = story.article(draw).lower()
        for name in ("a", "r"):
            assert story.slots[name].lower() in article
            assert story.slots[name].lower() in story.summary().lower()


def test_small_talk_is_clean_and_split_by_conversation():
    trained, tested = chitchat.chats()["train"], chitchat.chats()["test"]
    assert len(trained) > 10_000
    assert len(tested) > 2_000
    texts = [
        text for example in tested for turn in (*example.history, (example.prompt, example.answer)) for text in turn
    ]
    assert not [text for text in texts if "http" in text or "@" in text or re.search(r"\d{3}", text)]
    assert chitchat.example("test", "1") == chitchat.example("test", "1")


def test_retold_pairs_are_not_two_headlines():
    """So that training shows no pair of wordings that tests hold out."""
    for kind in events.KINDS:  # what tells a headline from the sentences of an article
        assert all("{d}" in lead for lead in kind.leads)
        assert kind.summary.endswith(".")
        assert not any("{d}" in headline or headline.endswith(".") for headline in kind.headlines)
    answers = set()
    for index in range(300):
        example = comp.retold(str(index))
        lines = [line for line in example.prompt.splitlines() if re.match(r"\w+ headline:|Headline \d:|\d\.|-", line)]
        assert len(lines) == 2
        assert any(line.endswith(".") or any(day in line for day in words.WEEKDAYS) for line in lines), lines
        answers.add(example.answer)
    assert answers == {"yes", "no"}


def test_stories_that_differ_are_told_in_pairs_of_wordings_of_their_split():
    """A pair held out for tests must not occur in training, not even as one that is not the same."""
    for split in ("train", "test"):
        draw = Draw(f"pairs/{split}", split)
        for kind in events.KINDS:
            allowed = combinations((kind.headlines, kind.headlines), split)
            for _ in range(20):
                first, second = (stories.story(draw, kind) for _ in range(2))
                told = first.headlines_beside(second, draw)
                pairs = [(stories._fill(a, first.slots), stories._fill(b, second.slots)) for a, b in allowed]
                assert told in pairs
