"""Sentiment of a short text, written like a post or like financial news: `positive`, `negative` or `neutral`."""

from __future__ import annotations

from train.tasks import words
from train.tasks.draw import Draw
from train.tasks.example import Example, Split
from train.tasks.lists import read

LABELS = ("positive", "negative", "neutral")

_VERBS = (
    "What is the sentiment of",
    "Classify the sentiment of",
    "Label the sentiment of",
    "Give the sentiment of",
    "Decide the sentiment of",
)
_OBJECTS = ("this tweet", "this text", "the following text", "this post", "the message", "the following tweet")
_HOW = (".", ". Answer positive, negative or neutral.", ": positive, negative or neutral?", ". Reply with one word.")
_LAYOUTS = (
    "{instruction}\n{text}",
    "{instruction}\nText: {text}",
    "{text}\n{instruction}",
    "Tweet: {text}\n{instruction}",
)

_LISTS = read("clsfy")
_GOOD: tuple[str, ...] = _LISTS["good"]
_BAD: tuple[str, ...] = _LISTS["bad"]
_PLAIN: tuple[str, ...] = _LISTS["plain"]
_THINGS: tuple[str, ...] = _LISTS["things"]
_PRAISE: tuple[str, ...] = _LISTS["praise"]
_BLAME: tuple[str, ...] = _LISTS["blame"]
_REPORT: tuple[str, ...] = _LISTS["report"]
_JUDGE_GOOD: tuple[str, ...] = _LISTS["judge good"]
_JUDGE_BAD: tuple[str, ...] = _LISTS["judge bad"]
_JUDGE_PLAIN: tuple[str, ...] = _LISTS["judge plain"]
_MARKET_GOOD: tuple[str, ...] = _LISTS["market good"]
_MARKET_BAD: tuple[str, ...] = _LISTS["market bad"]
_MARKET_PLAIN: tuple[str, ...] = _LISTS["market plain"]

_OPENERS = (
    "",
    "",
    "",
    "wow, ",
    "well, ",
    "honestly, ",
    "so ",
    "today: ",
    "ok, ",
    "hey, ",
    "update: ",
    "just to say, ",
    "news: ",
)
_CLOSERS = ("", "", "", "!", ".", "...", " :)", " #{t}", " #{d}", ", says {w}", " (from {p})", " @{w}")
_SMILEY_FREE = tuple(closer for closer in _CLOSERS if ":)" not in closer)

_PATTERNS = {
    "positive": (_PRAISE, _JUDGE_GOOD, _MARKET_GOOD),
    "negative": (_BLAME, _JUDGE_BAD, _MARKET_BAD),
    "neutral": (_REPORT, _JUDGE_PLAIN, _MARKET_PLAIN),
}


def example(split: Split, key: str) -> Example:
    draw = Draw(f"clsfy/{split}/{key}", split)
    label = draw.one(LABELS)
    verb, what, how = draw.phrase(_VERBS, _OBJECTS, _HOW)
    prompt = draw.one(_LAYOUTS).format(instruction=f"{verb} {what}{how}", text=_text(draw, label))
    return Example(prompt, label, "clsfy")


def _text(draw: Draw, label: str) -> str:
    """One clause of the label's sentiment, often with a neutral one before or after it."""
    patterns = _PATTERNS[label][draw.rng.choices((0, 1, 2), (3, 4, 3))[0]]
    opener, pattern, closer = draw.phrase(_OPENERS, patterns, _CLOSERS if label == "positive" else _SMILEY_FREE)
    text = _filled(draw, opener + pattern)
    if draw.chance(0.3):
        aside = _filled(draw, draw.one(_REPORT))
        text = f"{aside}. {text}" if draw.chance(0.5) else f"{text}, and {aside}"
    text += _filled(draw, closer)
    return text if draw.chance(0.4) else text[0].upper() + text[1:]


def _filled(draw: Draw, pattern: str) -> str:
    good, good2 = draw.rng.sample(_GOOD, 2)
    bad, bad2 = draw.rng.sample(_BAD, 2)
    return pattern.format(
        t=draw.one(_THINGS),
        g=good,
        g2=good2,
        b=bad,
        b2=bad2,
        o=draw.one(_PLAIN),
        p=draw.city(),
        d=draw.one(words.WEEKDAYS),
        n=draw.rng.randint(2, 59),
        c=draw.company() if "{c}" in pattern else "",
        x=draw.one(words.PRODUCTS),
        w=draw.noun(words.FIRST_NAMES),
    )
