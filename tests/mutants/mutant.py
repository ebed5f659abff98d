"""`Mutant`: a mechanism, how to cut it out of the source, and the tests that must fail without it."""

import dataclasses
from pathlib import Path


class StaleMutant(Exception):
    """The source has changed so that the cut is no longer what the mutant says; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`old` stands exactly once in `file` and is replaced by `new`. One of `tests` (pytest's ids) must fail then."""

    name: str
    cuts: str
    """What is lost without the mechanism, in one line."""
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def source(self, root: Path) -> str:
        """The file's text with the cut. Raises `StaleMutant` where it cannot be made or changes nothing."""
        where = f"{self.name} is stale: {self.file}"
        try:
            text = (root / self.file).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise StaleMutant(f"{where} does not exist") from None
        if (times := text.count(self.old)) != 1:
            line = self.old.strip().splitlines()[0]
            raise StaleMutant(f"{where} has {line!r} {times} times; a mutant replaces text that stands there once")
        cut = text.replace(self.old, self.new)
        try:
            compile(cut, self.file, "exec")
        except SyntaxError as error:
            raise StaleMutant(f"{where} is no Python with the cut: {error.msg}, line {error.lineno}") from None
        if self.old == self.new:
            raise StaleMutant(f"{where} is the same with the cut")
        return cut
