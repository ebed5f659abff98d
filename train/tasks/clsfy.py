"""Sentiment of a short text, written like a post or like financial news: `positive`, `negative` or `neutral`."""

from __future__ import annotations

from train.tasks import words
from train.tasks.draw import Draw
from train.tasks.example import Example, Split

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

_GOOD = words.split_words("""
    amazing awesome beautiful brilliant charming cheerful clever comfortable cosy delicious delightful elegant
    excellent fabulous fantastic fine flawless fresh friendly fun generous gorgeous great helpful impressive
    incredible inspiring kind lovely magical marvellous outstanding perfect pleasant reliable remarkable smooth
    spectacular splendid stunning superb terrific thoughtful thrilling touching wonderful
""")
_BAD = words.split_words("""
    annoying appalling awful bad bland boring broken careless cheap clumsy confusing dirty disappointing disgusting
    dreadful dull faulty frustrating gloomy greedy horrible inferior irritating lazy lousy mediocre messy nasty
    noisy overpriced painful pathetic pointless poor rotten rude shoddy silly sloppy slow stale stressful terrible
    ugly unbearable unfair unpleasant useless weak worthless
""")
_PLAIN = words.split_words(
    "average common daily local monthly new ordinary regular second standard third usual weekly yearly"
)
_THINGS = words.split_words("""
    airport album app bakery battery book bus cafe camera cinema coffee concert course dentist dinner episode ending
    festival film flight food game garden gym hotel interview keyboard landlord laptop lecture library lunch
    magazine match meal menu museum neighbour novel office park party phone play podcast price printer queue
    restaurant room sandwich school screen seat series service shop show song soup speech staff station story taxi
    teacher team theatre ticket tour train trip update video view waiter weather website weekend workshop
""")

_PRAISE = (
    "I love the {t}",
    "the {t} made my day",
    "I would go back to the {t} any time",
    "the {t} exceeded all hopes",
    "so happy with the {t}",
    "cannot get enough of the {t}",
    "thank you for the {t}",
    "the {t} is a dream",
    "hooray for the {t}",
    "the {t} was worth every penny",
)
_BLAME = (
    "I hate the {t}",
    "the {t} ruined my day",
    "I will never go back to the {t}",
    "the {t} was a waste of money",
    "so angry about the {t}",
    "fed up with the {t}",
    "I want a refund for the {t}",
    "the {t} is a nightmare",
    "shame on the {t}",
    "the {t} made me cry",
)
_REPORT = (
    "the {t} opens at {n}",
    "I am at the {t} now",
    "the {t} is on {d}",
    "the {t} moved to {p}",
    "we will see the {t} on {d}",
    "there is a {t} in {p}",
    "the {t} lasts {n} minutes",
    "the {t} starts on {d}",
    "my sister is at the {t}",
    "the {t} is next to the station",
)
_JUDGE_GOOD = (
    "the {t} was {g}",
    "what a {g} {t}",
    "such a {g} {t}",
    "the {t} is really {g}",
    "the {t} is not {b} at all",
    "nothing {b} about the {t}",
    "the {t} in {p} was {g}",
    "my {t} is {g} and {g2}",
    "the {t} was never {b}",
)
_JUDGE_BAD = (
    "the {t} was {b}",
    "what a {b} {t}",
    "such a {b} {t}",
    "the {t} is really {b}",
    "the {t} is not {g} at all",
    "nothing {g} about the {t}",
    "the {t} in {p} was {b}",
    "my {t} is {b} and {b2}",
    "the {t} was never {g}",
)
_JUDGE_PLAIN = (
    "the {t} is a {o} one",
    "it is the {o} {t}",
    "this is our {o} {t} in {p}",
    "the {o} {t} is on {d}",
    "we took the {o} {t}",
    "they have a {o} {t}",
)

_MARKET_GOOD = (
    "{c} shares jump {n} percent",
    "{c} posts record profit",
    "{c} beats forecasts with strong sales",
    "{c} raises its outlook",
    "profit at {c} soars",
    "{c} wins a large order from {p}",
    "investors cheer {c}",
    "sales of {x} at {c} surge",
    "{c} grows faster than its rivals",
)
_MARKET_BAD = (
    "{c} shares plunge {n} percent",
    "{c} posts heavy loss",
    "{c} misses forecasts with weak sales",
    "{c} cuts its outlook",
    "profit at {c} collapses",
    "{c} loses a large order from {p}",
    "investors flee {c}",
    "sales of {x} at {c} slump",
    "{c} warns of bankruptcy",
)
_MARKET_PLAIN = (
    "{c} shares unchanged",
    "{c} will publish its results on {d}",
    "{c} moves its office to {p}",
    "{c} holds its annual meeting on {d}",
    "{c} has {n} offices",
    "the shares of {c} are traded in {p}",
    "{c} names the date of its report",
    "{c} makes {x}",
    "{c} to hold a call on {d}",
)

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
