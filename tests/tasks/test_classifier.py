"""Telling tasks by keywords: learned from training prompts, judged on test prompts and on unrelated texts."""

import itertools

import pytest

from emoe_jax.errors import ConfigError
from emoe_jax.tasks import OTHER, TaskClassifier, TaskProfile
from emoe_jax.tasks.classifier import END_CHARS
from tests.effort import calls_made
from train.classifier import UNRELATED
from train.keywords import demo_prompts, with_demo_keywords, with_keywords
from train.tasks import TASKS

EMPTY = TaskProfile(num_layers=1, num_experts=8, top_k=2)


@pytest.fixture(scope="module")
def classifier() -> TaskClassifier:
    return TaskClassifier(with_demo_keywords(EMPTY, TASKS, seed=0, count=300))


@pytest.mark.parametrize("task", TASKS)
def test_held_out_prompts_are_told(classifier: TaskClassifier, task: str) -> None:
    prompts = demo_prompts(task, "test", 0, 200)
    wrong = [prompt for prompt in prompts if classifier.classify(prompt) != task]
    assert len(wrong) <= 0.05 * len(prompts), wrong[:5]


def test_it_abstains_on_unrelated_texts(classifier: TaskClassifier) -> None:
    taken = [(text, classifier.classify(text)) for text in UNRELATED if classifier.classify(text) != OTHER]
    assert len(taken) <= 1, taken


def test_instructions_are_found_at_both_ends_of_long_texts(classifier: TaskClassifier) -> None:
    filler = "The lake lies deep in the valley. " * END_CHARS
    instruction = "Please summarize the article in one sentence"
    assert classifier.classify(filler) == OTHER
    assert classifier.classify(f"{instruction}:\n{filler}") == "sum"
    assert classifier.classify(f"{filler}\n{instruction}.") == "sum"


def test_a_word_costs_the_same_however_many_keywords_there_are() -> None:
    """`train.classifier` says how many milliseconds 2,000 tokens take."""
    words = [f"word{number}" for number in range(2_000)]
    keywords = {f"{first} {second}": 1.0 for first, second in itertools.pairwise(words)}
    text = " ".join(words[:20] * 50)
    few = TaskClassifier(EMPTY.with_task("a", keywords=dict(itertools.islice(keywords.items(), 25))))
    many = TaskClassifier(EMPTY.with_task("a", keywords=keywords))
    assert few.scores(text) == many.scores(text) == {"a": 19.0}
    assert calls_made(lambda: many.classify(text)) == calls_made(lambda: few.classify(text))


def test_scores_add_up_each_keyword_once() -> None:
    profile = EMPTY.with_task("a", keywords={"one two": 1.0, "one two three": 2.0, "two": 4.0})
    classifier = TaskClassifier(profile.with_task("b", keywords={"one two": 8.0, "what ?": 16.0}).with_task("c"))
    assert classifier.tasks == ("a", "b")
    assert classifier.scores("One two, three; one two.") == {"a": 7.0, "b": 8.0}
    assert classifier.scores("one") == {"a": 0.0, "b": 0.0}
    assert classifier.scores("three one; what?") == {"a": 0.0, "b": 16.0}


def test_below_the_threshold_it_abstains() -> None:
    profile = TaskProfile(1, 8, 2, threshold=3.0).with_task("a", keywords={"x": 2.0, "y": 1.0})
    classifier = TaskClassifier(profile)
    assert [classifier.classify(text) for text in ("x", "x and y", "y y y", "")] == [OTHER, "a", OTHER, OTHER]
    assert TaskClassifier(EMPTY).classify("x") == OTHER


def test_keywords_need_prompts() -> None:
    with pytest.raises(ConfigError, match="task 'a' has 1 prompts to learn keywords from; 5 are the least"):
        with_keywords(EMPTY, {"a": ["one"]}, ["other"])
