"""Drills that the demo model is trained on beside the tasks, and never tested on: dense practice of what they need.

Answering, summarising and comparing all come down to finding a name again. A task shows that once per prompt; a drill
many times over: say names again, look names up in a list, tell whether two names are the same, compare pair after pair
of headlines.
"""

from __future__ import annotations

from collections.abc import Callable

from train.tasks import comp, stories, words
from train.tasks.draw import Draw
from train.tasks.example import Example

_REPEAT = ("Repeat", "Say again", "Copy", "Echo", "Write once more", "Repeat after me")
_LISTS = (words.CITIES, words.PROFESSIONS, words.FOODS, words.ANIMALS, words.INSTRUMENTS, words.LANGUAGES)
_MORE_LISTS = (words.SUBJECTS, words.SPORTS, words.COLOURS, words.PRODUCTS, words.HOBBIES, words.VEHICLES)
_SAME = ("Same or not?", "Are these the same?", "Same name?", "Compare:")


def example(key: str) -> Example:
    """A drill of any sort, of the training split like all drills."""
    draw = Draw(f"drill/{key}", "train")
    chance = draw.rng.random()
    sort = next(sort for sort, up_to in _SORTS.items() if chance < up_to)
    return sort(draw)


def _thing(draw: Draw) -> Callable[[], str]:
    """A maker of names of one sort."""
    sort = draw.rng.random()
    if sort < 0.3:
        return draw.person
    if sort < 0.5:
        return draw.company
    if sort < 0.6:
        return draw.made_up
    if sort < 0.7:
        return lambda: str(draw.rng.randint(3, 2020))
    nouns = _LISTS + _MORE_LISTS
    chosen = nouns[draw.rng.randrange(len(nouns))]
    return lambda: draw.noun(chosen)


def _echo(draw: Draw) -> Example:
    """Names, or the sentences of a story, said again."""
    if draw.chance(0.4):
        story = stories.story(draw)
        text = story.headline(draw) if draw.chance(0.5) else story.summary()
    else:
        text = ", ".join(draw.several(_thing(draw), draw.rng.randint(2, 7)))
    return Example(f"{draw.one(_REPEAT)}: {text}", text, "sum")


def _lookup(draw: Draw) -> Example:
    """A list of names with something that belongs to each, asked for one after another."""
    count = draw.rng.randint(2, 6)
    bearers, values = draw.several(_thing(draw), count), draw.several(_thing(draw), count)
    pairs = list(zip(bearers, values, strict=True))
    listed = "; ".join(f"{bearer}: {value}" for bearer, value in pairs)
    draw.rng.shuffle(pairs)
    return _turns([(f"{bearer}?", value) for bearer, value in pairs], "qa", before=f"{listed}.\n")


def _same_names(draw: Draw) -> Example:
    turns = []
    for _ in range(draw.rng.randint(3, 6)):
        first, second = draw.several(_thing(draw), 2)
        same = draw.chance(0.5)
        turns.append((f"{draw.one(_SAME)} {first} / {first if same else second}", "yes" if same else "no"))
    return _turns(turns, "comp")


def _same_stories(draw: Draw) -> Example:
    """The comparing task, three times in a row, without its instruction from the second time on."""
    whole = comp.example("train", str(draw.rng.random()))
    turns = [(whole.prompt, whole.answer)]
    for _ in range(2):
        first, second, same = comp.pair(draw)
        turns.append((f"And these?\n1. {first}\n2. {second}", "yes" if same else "no"))
    return _turns(turns, "comp")


_SORTS = {_echo: 0.25, _lookup: 0.6, _same_names: 0.8, _same_stories: 1.0}  # cumulative


def _turns(turns: list[tuple[str, str]], task: str, before: str = "") -> Example:
    turns[0] = (before + turns[0][0], turns[0][1])
    return Example(turns[-1][0], turns[-1][1], task, tuple(turns[:-1]))
