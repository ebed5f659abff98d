"""Real small talk for training: the Chit-Chat dataset (BYU PCC lab, MIT licence, PyPI `chitchat-dataset`), cleaned.

Only texts are taken, never senders or times. What holds links, handles, long numbers or coarse words is left out.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import random
import re

from train.tasks.draw import split_of
from train.tasks.example import Example, Split

_UNWANTED = re.compile(
    r"https?:|www\.|@|\d{3,}|[^\x20-\x7e]"
    r"|\b(?:hell|ass|sex|sexy|gay|die|dies|died|gun|guns|god|drug|drugs|kill|killed|hate|crap|dick|damn|trump|boob|boobs)\b"
    r"|\b(?:fuck|shit|bitch|asshole|suck|porn|suicid|racis|nazi|rape|penis|stupid|idiot|jesus|church|byu|provo)",
    re.IGNORECASE,
)
_LONGEST_TURN = 160  # characters
_TURNS = 6  # user and assistant turns of one example together, at most


@functools.cache
def chats() -> dict[Split, tuple[Example, ...]]:
    """Chats of two to six turns; one in five conversations is for testing. Raises ImportError without the package."""
    try:
        dataset = importlib.resources.files("chitchat_dataset") / "dataset.json"
    except ModuleNotFoundError:
        raise ImportError("the package chitchat-dataset is missing: pip install 'emoe-jax[train]'") from None
    found: dict[Split, list[Example]] = {"train": [], "test": []}
    for name, conversation in json.loads(dataset.read_text(encoding="utf-8")).items():
        run: list[str] = []
        for turn in [*conversation["messages"], []]:
            text = " ".join(message["text"].strip() for message in turn)
            clean = 0 < len(text) <= _LONGEST_TURN and not _UNWANTED.search(text)
            if clean:
                run.append(text)
            if len(run) == _TURNS or not clean:
                found[split_of(name)] += _example(run)
                run = []
    return {split: tuple(examples) for split, examples in found.items()}


def _example(turns: list[str]) -> list[Example]:
    pairs = list(zip(turns[::2], turns[1::2], strict=False))
    return [Example(pairs[-1][0], pairs[-1][1], "conv", tuple(pairs[:-1]))] if pairs else []


def example(split: Split, key: str) -> Example:
    """One chat of the split."""
    pool = chats()[split]
    return pool[random.Random(f"chitchat/{split}/{key}").randrange(len(pool))]
