"""Comparing two headlines: do they report the same story? Answers `yes` or `no`.

The pairs that are not the same are of three sorts: two unrelated stories, the same kind of event happening to somebody
else, and another event about the same party. The latter two cannot be told by the topic or by the names alone.
"""

from __future__ import annotations

from train.tasks import events, stories
from train.tasks.draw import Draw
from train.tasks.example import Example, Split

_ASKS = (
    "Are these two headlines",
    "Are the following headlines",
    "Are both headlines",
    "Are the two headlines below",
    "Compare the headlines. Are they",
)
_ABOUT = ("about the same story", "about the same event", "similar", "reporting the same thing", "on the same news")
_HOW = ("?", "? Answer yes or no.", "? Yes or no?", "? Reply with yes or no.")
_LAYOUTS = (
    "{instruction}\n1. {first}\n2. {second}",
    "{instruction}\nHeadline 1: {first}\nHeadline 2: {second}",
    "First headline: {first}\nSecond headline: {second}\n{instruction}",
    "{instruction}\n- {first}\n- {second}",
)


def example(split: Split, key: str) -> Example:
    draw = Draw(f"comp/{split}/{key}", split)
    return _asked(draw, *pair(draw))


def retold(key: str) -> Example:
    """For training only: a headline beside a sentence from an article, or two such sentences.

    Pairs of headlines are few enough to be learned by heart. Who also has to match each with what it stands for need
    not have seen a pair.
    """
    draw = Draw(f"comp/retold/{key}", "train")
    story = stories.story(draw)
    same = draw.chance(0.5)
    other = story if same else _other(draw, story)
    first = second = story.retelling(draw)
    while first == second:
        second = other.retelling(draw) if draw.chance(0.3) else other.headline(draw)
    return _asked(draw, *((first, second) if draw.chance(0.5) else (second, first)), same)


def _asked(draw: Draw, first: str, second: str, same: bool) -> Example:
    ask, about, how = draw.phrase(_ASKS, _ABOUT, _HOW)
    prompt = draw.one(_LAYOUTS).format(instruction=f"{ask} {about}{how}", first=first, second=second)
    return Example(prompt, "yes" if same else "no", "comp")


def pair(draw: Draw) -> tuple[str, str, bool]:
    """Two headlines, and whether they report the same story."""
    story = stories.story(draw)
    if draw.chance(0.5):
        return *story.headlines(draw), True
    other = _other(draw, story)
    if other.kind == story.kind:
        return *story.headlines_beside(other, draw), False
    first, second = story.headline(draw), other.headline(draw)
    return (second, first, False) if draw.chance(0.5) else (first, second, False)


def _other(draw: Draw, story: stories.Story) -> stories.Story:
    """Another story: somebody else's, of the same kind; or the same party's, of another kind; or unrelated."""
    sort = draw.rng.random()
    while True:
        if sort < 0.35:
            other = stories.story(draw, kind=story.kind)
        elif sort < 0.65:
            kinds = [kind for kind in events.KINDS if kind.a == story.kind.a and kind != story.kind]
            other = stories.story(draw, kind=kinds[draw.rng.randrange(len(kinds))], a=story.slots["a"])
        else:
            other = stories.story(draw)
        if other.kind != story.kind or other.slots["a"] != story.slots["a"]:
            return other
