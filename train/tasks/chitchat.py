"""Real small talk for training: the Chit-Chat dataset (BYU PCC lab, MIT licence, PyPI `chitchat-dataset`), cleaned.

Only texts are taken, never senders or times. What holds links, handles, long numbers or coarse words is left out.
"""

from __future__ import annotations

import functools
import random
import re

from train.tasks.draw import split_of
from train.tasks.example import Example, Split

_UNWANTED = re.compile(
    r"https?:|www\.|@|\d{3,}|[^\x20-\x7e]|\b(?:fuck|shit|sex|sexy|damn|hell|bitch|ass|asshole|crap|suck|sucks|porn|drug|drugs|kill|die|dead|"
    r"suicide|gay|racist|nazi|rape|boob|boobs|penis|dick|stupid|idiot|hate|god|jesus|church|trump|gun|guns|byu|provo)\w*\b",
    re.IGNORECASE,
)
_LONGEST_TURN = 160  # characters
_TURNS = 6  # user and assistant turns of one example together, at most


@functools.cache
def chats(split: Split) -> tuple[Example, ...]:
    """Chats of two to six turns; one in five conversations is for testing. Raises ImportError without the package."""
    try:
        import chitchat_dataset
    except ImportError:
        raise ImportError("the package chitchat-dataset is missing: pip install 'emoe-jax[train]'") from None
    found = []
    for name, conversation in chitchat_dataset.Dataset().items():
        if split_of(name) != split:
            continue
        texts = [" ".join(message["text"].strip() for message in turn) for turn in conversation["messages"]]
        run: list[str] = []
        for text in [*texts, ""]:
            clean = 0 < len(text) <= _LONGEST_TURN and not _UNWANTED.search(text)
            if clean:
                run.append(text)
            if len(run) == _TURNS or not clean:
                found += _example(run)
                run = []
    return tuple(found)


def _example(turns: list[str]) -> list[Example]:
    pairs = list(zip(turns[::2], turns[1::2], strict=False))
    return [Example(pairs[-1][0], pairs[-1][1], "conv", tuple(pairs[:-1]))] if pairs else []


def example(split: Split, key: str) -> Example:
    """One chat of the split."""
    pool = chats(split)
    return pool[random.Random(f"chitchat/{split}/{key}").randrange(len(pool))]
