"""News stories made up for the summarising and comparing tasks: one event with its headlines, article and summary."""

from __future__ import annotations

import dataclasses

from train.tasks import words
from train.tasks.draw import Draw
from train.tasks.events import KINDS, Kind

_QUOTES = (
    '"This is a big day for us"',
    '"We are proud of what was done"',
    '"It was not an easy choice"',
    '"We did not expect this"',
    '"Everyone worked hard for this"',
    '"We will learn from it"',
    '"The coming weeks will show"',
    '"We owe it to our people"',
)
_SPEAKERS = ("{q}, said {w}", "{w} said: {q}", "{q}, {w} told reporters", "{q} were the words of {w}")
_ROLES = ("a speaker", "an adviser", "a witness", "a local teacher", "the deputy head", "a neighbour", "an expert")
_FILLERS = (
    "The news was first reported by a local paper",
    "Many people followed the event online",
    "Experts had expected it for weeks",
    "The details will be made public next month",
    "The weather was mild that day",
    "Social media was full of comments",
    "Nobody wanted to talk about the costs",
    "A report on the matter is due soon",
    "Talks went on late into the night",
    "It is the second such event this year",
    "Local shops stayed open",
    "Traffic was heavy all morning",
)
_AFTERS = ("", "", " in the evening", " at noon", " before work began", ", as many had hoped", ", a source confirmed")


@dataclasses.dataclass(frozen=True)
class Story:
    """One event with its names filled in."""

    kind: Kind
    slots: dict[str, str]

    def headline(self, draw: Draw) -> str:
        return _fill(draw.one(self.kind.headlines), self.slots)

    def headlines(self, draw: Draw) -> tuple[str, str]:
        """Two different headlines of this story, a pair of wordings that the split may use."""
        while True:
            first, second = draw.phrase(self.kind.headlines, self.kind.headlines)
            if first != second:
                return _fill(first, self.slots), _fill(second, self.slots)

    def headlines_beside(self, other: Story, draw: Draw) -> tuple[str, str]:
        """A headline of this story and one of another of its kind, a pair of wordings that the split may use.

        If any pair would do, training would show those of the test split, and always in stories that differ.
        """
        first, second = draw.phrase(self.kind.headlines, self.kind.headlines)
        return _fill(first, self.slots), _fill(second, other.slots)

    def retelling(self, draw: Draw) -> str:
        """The same in a sentence that is no headline: how an article begins, or the summary."""
        return self.summary() if draw.chance(0.3) else _fill(draw.one(self.kind.leads), self.slots)

    def article(self, draw: Draw) -> str:
        """Four to six sentences: what happened and why, somebody's words, things beside the point."""
        lead, after = draw.phrase(self.kind.leads, _AFTERS)
        rest = [_speech(draw), *draw.rng.sample(_FILLERS, draw.rng.randint(1, 3))]
        draw.rng.shuffle(rest)
        first = _fill(f"{lead} {{r}}{after}", self.slots)
        return " ".join(f"{sentence}." for sentence in [first, *rest])

    def summary(self) -> str:
        return _fill(self.kind.summary, self.slots)


def _fill(template: str, slots: dict[str, str]) -> str:
    text = template.format(**slots)
    return text[0].upper() + text[1:]


def _speech(draw: Draw) -> str:
    speaker, quote = draw.phrase(_SPEAKERS, _QUOTES)
    return _fill(
        speaker, {"q": quote, "w": f"{draw.person()}, {draw.one(_ROLES)}" if speaker.endswith("{w}") else draw.person()}
    )


def _name(draw: Draw, kind: str) -> str:
    return {"company": draw.company, "person": draw.person, "city": draw.city}[kind]()


def story(draw: Draw, kind: Kind | None = None, a: str | None = None) -> Story:
    """A story of any kind, or of the kind given, about anybody or about `a`."""
    kind = kind or KINDS[draw.rng.randrange(len(KINDS))]
    slots = {"a": a or _name(draw, kind.a)}
    slots["b"] = next(name for name in iter(lambda: _name(draw, kind.b), None) if name != slots["a"])
    slots |= {"d": draw.one(words.WEEKDAYS), "n": str(draw.rng.randint(3, 99)), "x": draw.one(kind.things)}
    slots["r"] = draw.one(kind.reasons).format(**slots)
    return Story(kind, slots)
