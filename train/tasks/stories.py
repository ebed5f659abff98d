"""News stories made up for the summarising and comparing tasks: one event with its headlines, article and summary.

Slots: `{a}` who it is about, `{b}` a second party, `{p}` the place, `{d}` the day, `{n}` a number, `{x}` a thing.
"""

from __future__ import annotations

import dataclasses

from train.tasks import words
from train.tasks.draw import Draw


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of event: who takes part, and the ways to report it."""

    name: str
    a: str  # which names fill {a} and {b}: "company", "person" or "city"
    b: str
    things: tuple[str, ...]
    headlines: tuple[str, ...]
    leads: tuple[str, ...]
    reasons: tuple[str, ...]
    summary: str


KINDS = (
    Kind(
        "merger",
        "company",
        "company",
        words.PRODUCTS,
        (
            "{a} to merge with {b}",
            "{a} and {b} agree merger",
            "{a} joins forces with {b}",
            "Merger of {a} and {b} agreed",
            "{b} and {a} become one company",
        ),
        (
            "{a} and {b} said on {d} that they will merge",
            "{a} will merge with {b}, both companies said on {d}",
            "On {d} {a} announced a merger with {b}",
        ),
        ("to save costs", "to sell more {x}", "to enter new markets", "after years of talks"),
        "{a} will merge with {b} {r}.",
    ),
    Kind(
        "layoffs",
        "company",
        "person",
        words.PRODUCTS,
        (
            "{a} cuts {n} jobs",
            "{n} jobs to go at {a}",
            "{a} lays off {n} workers",
            "Job losses at {a}: {n} workers to leave",
            "{a} fires {n} staff",
        ),
        (
            "{a} said on {d} that it will cut {n} jobs",
            "On {d} {a} announced that {n} workers must leave",
            "{n} workers of {a} learned on {d} that they will lose their jobs",
        ),
        ("because sales of {x} fell", "after a bad year", "to save costs", "because orders for {x} dried up"),
        "{a} will cut {n} jobs {r}.",
    ),
    Kind(
        "launch",
        "company",
        "person",
        words.PRODUCTS,
        (
            "{a} launches new {x}",
            "New {x} from {a}",
            "{a} shows its new {x}",
            "{a} brings {x} to market",
            "{x} are the latest idea of {a}",
        ),
        (
            "{a} presented its new {x} on {d}",
            "On {d} {a} showed new {x} to the press",
            "New {x} by {a} were presented on {d}",
        ),
        ("to win younger customers", "to beat its rivals", "after long tests", "in time for the holidays"),
        "{a} launched new {x} {r}.",
    ),
    Kind(
        "profit",
        "company",
        "person",
        words.PRODUCTS,
        (
            "{a} profit up {n} percent",
            "Profit of {a} rises by {n} percent",
            "{a} earns {n} percent more",
            "Strong year: {a} makes {n} percent more profit",
        ),
        (
            "{a} said on {d} that its profit rose by {n} percent",
            "Profit at {a} went up by {n} percent, the company said on {d}",
            "On {d} {a} reported a profit gain of {n} percent",
        ),
        ("because {x} sold well", "thanks to lower costs", "thanks to strong demand for {x}", "after a record season"),
        "{a} raised its profit by {n} percent {r}.",
    ),
    Kind(
        "recall",
        "company",
        "person",
        words.PRODUCTS,
        (
            "{a} recalls {x}",
            "{a} takes {x} off the shelves",
            "{x} by {a} recalled",
            "Faulty {x}: {a} starts recall",
            "{a} asks buyers to return {x}",
        ),
        (
            "{a} is recalling its {x}, it said on {d}",
            "On {d} {a} asked buyers to return its {x}",
            "Buyers of {x} by {a} should return them, the company said on {d}",
        ),
        ("because of a fire risk", "after {n} accidents", "because a part may break", "after complaints from users"),
        "{a} recalled its {x} {r}.",
    ),
    Kind(
        "lawsuit",
        "company",
        "company",
        words.PRODUCTS,
        (
            "{a} sues {b}",
            "{a} takes {b} to court",
            "{b} sued by {a}",
            "Lawsuit: {a} against {b}",
            "{b} must face {a} in court",
        ),
        (
            "{a} has taken {b} to court, lawyers said on {d}",
            "On {d} {a} filed a lawsuit against {b}",
            "{a} sued {b} on {d}",
        ),
        (
            "over the design of its {x}",
            "over unpaid bills",
            "because of a broken contract",
            "over a stolen idea for {x}",
        ),
        "{a} sued {b} {r}.",
    ),
    Kind(
        "factory",
        "company",
        "city",
        words.PRODUCTS,
        (
            "{a} builds factory in {b}",
            "New {a} factory for {b}",
            "{b} gets a factory of {a}",
            "{a} chooses {b} for new plant",
            "{a} to make {x} in {b}",
        ),
        (
            "{a} will build a factory for {x} in {b}, it said on {d}",
            "On {d} {a} announced a new plant for {x} in {b}",
            "{b} will get a new plant of {a} for {x}, officials said on {d}",
        ),
        ("to create {n} jobs", "to be closer to its customers", "to meet demand", "because land there is cheap"),
        "{a} will build a factory in {b} {r}.",
    ),
    Kind(
        "strike",
        "company",
        "city",
        words.PRODUCTS,
        (
            "Workers of {a} on strike in {b}",
            "Strike hits {a} in {b}",
            "{a} staff in {b} walk out",
            "{b}: {a} workers stop work",
        ),
        (
            "Workers of {a} in {b} went on strike on {d}",
            "On {d} staff of {a} walked out in {b}",
            "A strike stopped work at {a} in {b} on {d}",
        ),
        ("for better pay", "over long hours", "after {n} jobs were cut", "over unsafe {x}"),
        "Workers of {a} went on strike in {b} {r}.",
    ),
    Kind(
        "appointment",
        "person",
        "company",
        words.PRODUCTS,
        (
            "{a} to lead {b}",
            "{b} names {a} as new head",
            "{a} takes over at {b}",
            "New boss for {b}: {a}",
            "{b} appoints {a}",
        ),
        (
            "{a} will be the new head of {b}, the company said on {d}",
            "On {d} {b} named {a} as its new head",
            "{b} chose {a} as its head on {d}",
        ),
        (
            "after the old head retired",
            "to sell more {x}",
            "after a long search",
            "to bring the company back to growth",
        ),
        "{a} will lead {b} {r}.",
    ),
    Kind(
        "resignation",
        "person",
        "company",
        words.PRODUCTS,
        ("{a} quits {b}", "{a} leaves {b}", "{b} loses {a}", "Head of {b} {a} resigns", "{a} steps down at {b}"),
        (
            "{a} is leaving {b}, the company said on {d}",
            "On {d} {a} resigned as head of {b}",
            "{b} said on {d} that {a} is stepping down",
        ),
        ("after weak sales of {x}", "for health reasons", "after a row with the board", "to spend time with family"),
        "{a} left {b} {r}.",
    ),
    Kind(
        "mayor",
        "person",
        "city",
        words.HOBBIES,
        (
            "{a} elected mayor of {b}",
            "{b} votes for {a}",
            "{a} wins vote in {b}",
            "New mayor of {b}: {a}",
            "{b} chooses {a} as mayor",
        ),
        (
            "{a} was elected mayor of {b} on {d}",
            "On {d} the people of {b} chose {a} as mayor",
            "{b} has a new mayor after {a} won the vote on {d}",
        ),
        ("with {n} percent of the vote", "after a close race", "by a wide margin", "after promising cheaper buses"),
        "{a} was elected mayor of {b} {r}.",
    ),
    Kind(
        "award",
        "person",
        "city",
        words.SUBJECTS,
        (
            "{a} wins {x} prize in {b}",
            "{x} prize for {a}",
            "Prize in {b} goes to {a} for {x}",
            "{a} honoured for {x} in {b}",
        ),
        (
            "{a} won the {x} prize in {b} on {d}",
            "On {d} the {x} prize was given to {a} in {b}",
            "In {b} {a} received the {x} prize on {d}",
        ),
        ("for a life of work", "for a bold new idea", "after {n} years of research", "for the best work of the year"),
        "{a} won the {x} prize in {b} {r}.",
    ),
    Kind(
        "match",
        "city",
        "city",
        words.SPORTS,
        (
            "{a} beats {b} in {x}",
            "{b} loses to {a} in {x}",
            "{x}: {a} defeats {b}",
            "{x} win for {a} over {b}",
            "{a} too strong for {b} in {x}",
        ),
        (
            "The {x} team of {a} beat {b} on {d}",
            "On {d} {a} won the {x} match against {b}",
            "{b} lost the {x} match against {a} on {d}",
        ),
        ("by {n} points", "after a late comeback", "in front of a full house", "in the last minute"),
        "{a} beat {b} in {x} {r}.",
    ),
    Kind(
        "storm",
        "city",
        "person",
        words.PRODUCTS,
        (
            "Storm hits {a}",
            "{a} hit by heavy storm",
            "Heavy storm over {a}",
            "Storm leaves {n} homes in {a} without power",
            "{a} cleans up after storm",
        ),
        ("A heavy storm hit {a} on {d}", "On {d} a storm passed over {a}", "{a} was hit by a heavy storm on {d}"),
        (
            "and left {n} homes without power",
            "and closed all schools",
            "and flooded many streets",
            "and stopped all trains",
        ),
        "A storm hit {a} {r}.",
    ),
    Kind(
        "fire",
        "city",
        "company",
        words.PRODUCTS,
        ("Fire at {b} plant in {a}", "{b} plant in {a} burns", "{a}: fire destroys {b} plant", "Fire in {a} hits {b}"),
        (
            "A fire broke out at a plant of {b} in {a} on {d}",
            "On {d} a plant of {b} in {a} caught fire",
            "A plant of {b} in {a} burned on {d}",
        ),
        (
            "and destroyed many {x}",
            "and {n} people had to leave",
            "but nobody was hurt",
            "and smoke was seen for miles",
        ),
        "A fire broke out at {b} in {a} {r}.",
    ),
    Kind(
        "festival",
        "city",
        "person",
        words.FOODS,
        (
            "{a} celebrates {x} festival",
            "{x} festival opens in {a}",
            "Thousands visit {x} festival in {a}",
            "{a} opens its {x} festival",
        ),
        (
            "{a} opened its festival of {x} on {d}",
            "On {d} the festival of {x} began in {a}",
            "A festival of {x} started in {a} on {d}",
        ),
        ("with {n} guests", "with music and dance", "under a blue sky", "for the first time in years"),
        "{a} opened a festival of {x} {r}.",
    ),
    Kind(
        "bridge",
        "city",
        "person",
        words.VEHICLES,
        ("{a} opens new bridge", "New bridge for {a}", "Bridge in {a} finished", "{a} gets a bridge for {n} million"),
        (
            "A new bridge was opened in {a} on {d}",
            "On {d} {a} opened its new bridge",
            "{a} finished its new bridge on {d}",
        ),
        (
            "after {n} months of work",
            "at a cost of {n} million",
            "to ease traffic",
            "to make way for more than one {x}",
        ),
        "{a} opened a new bridge {r}.",
    ),
    Kind(
        "tour",
        "person",
        "city",
        words.INSTRUMENTS,
        (
            "{a} plays {x} in {b}",
            "{x} concert by {a} in {b}",
            "{b} cheers {x} player {a}",
            "{a} gives {x} concert in {b}",
        ),
        (
            "{a} played the {x} in {b} on {d}",
            "On {d} {a} gave a {x} concert in {b}",
            "{b} heard {a} play the {x} on {d}",
        ),
        (
            "in front of {n} guests",
            "to raise money for schools",
            "at the start of a long tour",
            "for the first time in years",
        ),
        "{a} played the {x} in {b} {r}.",
    ),
)

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
