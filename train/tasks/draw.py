"""Seeded drawing that keeps the two splits apart: which phrases, names and pairs a split may use.

A split is a property of what is drawn, decided by a stable checksum, never of the seed. So no training seed, however
long it runs, can produce a phrase combination or a full name that belongs to the test split.
"""

from __future__ import annotations

import functools
import itertools
import random
import zlib
from collections.abc import Sequence

from train.tasks import words
from train.tasks.example import Split

TEST_SHARE = 5  # one in five phrase combinations and full names belongs to the test split
UNSEEN_WORD_SHARE = 12  # one in twelve proper nouns never occurs in training
UNSEEN_WORD_RATE = 0.15  # how often a proper noun of a test example comes from those


def checksum(text: str) -> int:
    """A hash that is the same on every machine and in every process."""
    return zlib.crc32(text.encode())


def split_of(text: str) -> Split:
    """The split that a full name or another combination belongs to."""
    return "test" if checksum(text) % TEST_SHARE == 0 else "train"


@functools.cache
def combinations(parts: tuple[tuple[str, ...], ...], split: Split) -> tuple[tuple[str, ...], ...]:
    """The combinations of one entry per part that a split may use: tests have the fifth with the smallest checksums."""
    ranked = sorted(set(itertools.product(*parts)), key=lambda entry: (checksum("|".join(entry)), entry))
    tested = set(ranked[: len(ranked) // TEST_SHARE])
    if not tested:
        raise ValueError(f"{len(ranked)} combinations are too few to hold any out, {TEST_SHARE} are needed: {parts}")
    return tuple(entry for entry in itertools.product(*parts) if (entry in tested) == (split == "test"))


@functools.cache
def proper_nouns(nouns: tuple[str, ...], seen: bool) -> tuple[str, ...]:
    """The nouns that training may use (`seen`), or those that only tests use."""
    return tuple(noun for noun in nouns if (checksum(noun) % UNSEEN_WORD_SHARE != 0) == seen)


class Draw:
    """A source of random choices for one example of one split."""

    def __init__(self, key: str, split: Split, coined: float = 0.0) -> None:
        """`coined` is the share of nouns that are made up instead of taken from their list."""
        self.rng = random.Random(key)
        self.split: Split = split
        self.coined = coined

    def one(self, options: Sequence[str]) -> str:
        """Any of the options; both splits may use each."""
        return options[int(self.rng.random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def phrase(self, *parts: tuple[str, ...]) -> tuple[str, ...]:
        """One entry of each part, as a combination that belongs to this split."""
        options = combinations(parts, self.split)
        return options[int(self.rng.random() * len(options))]

    def noun(self, nouns: tuple[str, ...]) -> str:
        """A proper noun: in the test split sometimes one that training never showed."""
        if self.coined and self.chance(self.coined):
            word = self.made_up()
            return word if nouns[0][0].isupper() else word.lower()
        unseen = self.split == "test" and self.chance(UNSEEN_WORD_RATE)
        return self.one(proper_nouns(nouns, not unseen) or nouns)

    def person(self) -> str:
        """A full name of this split: common names, or made up of syllables in one case of four."""
        if self.chance(0.25):
            return f"{self.noun(words.FIRST_NAMES)} {self.made_up()}"
        return self._held_out_name(words.FIRST_NAMES, words.SURNAMES)

    def company(self) -> str:
        """A company name of this split."""
        if self.chance(0.2):
            return f"{self.made_up()} {self.one(words.COMPANY_KINDS)}"
        return self._held_out_name(words.COMPANY_STEMS, words.COMPANY_KINDS)

    def city(self) -> str:
        return self.noun(words.CITIES)

    def made_up(self) -> str:
        """A name that no list holds, of two or three syllables."""
        while True:
            tail = self.one(words.SYLLABLES_TAIL)
            if self.chance(0.3):
                tail += self.one(words.SYLLABLES_TAIL)
            name = self.one(words.SYLLABLES_HEAD) + tail
            if split_of(name) == self.split:
                return name

    def several(self, make, count: int) -> list[str]:
        """`count` different results of `make()`."""
        found: list[str] = []
        while len(found) < count:
            candidate = make()
            if candidate not in found:
                found.append(candidate)
        return found

    def _held_out_name(self, firsts: tuple[str, ...], lasts: tuple[str, ...]) -> str:
        while True:
            name = f"{self.noun(firsts)} {self.one(lasts)}"
            if split_of(name) == self.split:
                return name
