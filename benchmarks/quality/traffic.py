"""What is asked: prompts of the tasks and stretches of real text, as a stream whose topics come in bursts."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.misnamed import misnamed
from emoe_jax.checkpoint import Tokenizer
from emoe_jax.config import ModelConfig
from train.prompts import Prompt, stretch
from train.tasks import MORE, TASKS, examples, texts
from train.tasks.example import Example, Split

PROMPT_TASKS = (*TASKS, *MORE)
TEXT_TASKS = texts.KINDS
ALL_TASKS = (*PROMPT_TASKS, *TEXT_TASKS)
BURST = 5
"""Prompts of one task that come one after another."""


class Count(NamedTuple):
    """Prompts of each task, and stretches of each kind of text."""

    prompts: int
    stretches: int


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt, or one stretch of text.

    `scored` are the tokens whose perplexity counts: of a prompt its true answer with the token that ends it, of a text
    all but its first token, which is then the prompt.
    """

    task: str
    prompt: tuple[int, ...]
    scored: tuple[int, ...]
    answer: str | None
    """The true answer; None of a text, which is only read."""


def draw(
    tokenizer: Tokenizer, config: ModelConfig, tasks: Sequence[str], split: Split, seed: int, count: Count
) -> tuple[dict[str, list[Item]], dict[str, str]]:
    """Items of each task, and of the kinds of text whose package is not installed the reason they are left out.

    Raises `ConfigError` where the chat template refuses a prompt.
    """
    items: dict[str, list[Item]] = {}
    missing: dict[str, str] = {}
    for task in tasks:
        try:
            if task in TEXT_TASKS:
                stretches = [
                    stretch(tokenizer, config, task, split, f"{seed}/{index}") for index in range(count.stretches)
                ]
                items[task] = [Item(task, tuple(ids[:1]), tuple(ids[1:]), None) for ids in stretches]
            else:
                items[task] = [
                    _asked(tokenizer, config, task, each) for each in examples(task, split, seed, count.prompts)
                ]
        except ImportError as error:
            missing[task] = str(error)
    return items, missing


def in_bursts(items: Mapping[str, Sequence[Item]], seed: int, burst: int = BURST) -> list[Item]:
    """All items in rounds: every task once per round, in a new random order, with its next `burst` items."""
    rng = random.Random(seed)
    stream: list[Item] = []
    for start in range(0, max(map(len, items.values()), default=0), burst):
        for task in rng.sample(list(items), len(items)):
            stream += items[task][start : start + burst]
    return stream


def wrongly_named(stream: Sequence[Item], share: float, seed: int) -> list[Item]:
    """The items, where prompts name another task of the stream with a chance of `share`. Texts keep theirs."""
    names = iter(misnamed([item.task for item in stream if item.answer is not None], share, seed))
    return [item if item.answer is None else dataclasses.replace(item, task=next(names)) for item in stream]


def _asked(tokenizer: Tokenizer, config: ModelConfig, task: str, example: Example) -> Item:
    prompt = Prompt(task, tuple(example.messages)).token_ids(tokenizer)
    ends = config.eos_token_ids[:1]
    scored = (*tokenizer.encode(example.answer, add_special_tokens=False), *ends)
    return Item(task, tuple(prompt), scored, example.answer)
