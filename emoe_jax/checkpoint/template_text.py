"""A string that knows which of its characters the chat template wrote. The rest came with the request.

Only these characters may become control tokens. A template is free to split, trim, join and format its texts before
it writes them, so every method of `str` keeps the knowledge. Where an operation cannot say which character comes from
where, its characters count as the request's: then they stay text.

    >>> (TemplateText.own("<s>") + "<s>").owned
    b'\\x01\\x01\\x01\\x00\\x00\\x00'
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex

_OWN, _FOREIGN = b"\1", b"\0"
_PERCENT = re.compile(r"%(?:\((?P<name>[^)]*)\))?(?P<kind>[sd%])")
_PLAIN_NUMBERS = (bool, int, float, type(None))


class TemplateText(str):
    """`owned` has a byte for each character: 1 where the template wrote it, else 0."""

    owned: bytes

    def __new__(cls, text: str, owned: bytes | None = None) -> "TemplateText":
        """`text` counts as the request's where `owned` is not given."""
        self = super().__new__(cls, text)
        if owned is None:
            owned = text.owned if isinstance(text, TemplateText) else _FOREIGN * len(text)
        self.owned = owned
        return self

    @classmethod
    def own(cls, text: str) -> "TemplateText":
        """Text that the template wrote."""
        return cls(text, _OWN * len(text))

    @classmethod
    def concat(cls, parts: Iterable[str]) -> "TemplateText":
        """The parts behind each other."""
        parts = list(parts)
        owned = b"".join(p.owned if isinstance(p, TemplateText) else _FOREIGN * len(p) for p in parts)
        return cls("".join(parts), owned)

    @classmethod
    def of_value(cls, value: Any) -> str:
        """What a template writes for a value. Numbers are no text of the request: they cannot spell anything."""
        if isinstance(value, str):
            return value if isinstance(value, TemplateText) else cls(value)
        return cls.own(str(value)) if isinstance(value, _PLAIN_NUMBERS) else cls(str(value))

    @property
    def _all_owned(self) -> bool:
        return _FOREIGN not in self.owned

    def _whole(self, text: str, *others: Any) -> "TemplateText":
        """`text` made of all of this and of other texts in an order that is not known."""
        every = self._all_owned and all(not isinstance(o, str) or TemplateText(o)._all_owned for o in others)
        return TemplateText(text, (_OWN if every else _FOREIGN) * len(text))

    def __str__(self) -> "TemplateText":
        return self

    def __format__(self, spec: str) -> str:
        return self if not spec else self._whole(super().__format__(spec))

    def __iter__(self) -> Iterator["TemplateText"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: SupportsIndex | slice) -> "TemplateText":  # pyright: ignore[reportIncompatibleMethodOverride]
        text, owned = super().__getitem__(key), self.owned[key]
        return TemplateText(text, owned if isinstance(owned, bytes) else bytes([owned]))

    def __add__(self, other: str) -> "TemplateText":
        return TemplateText.concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> "TemplateText":
        return TemplateText.concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> "TemplateText":
        return TemplateText(super().__mul__(count), self.owned * count)

    def __rmul__(self, count: SupportsIndex) -> "TemplateText":
        return self * count

    def __mod__(self, values: Any) -> "TemplateText":
        """Knows where `%s` and `%d` stand in a format of the template's own; nothing of other formats."""
        text = super().__mod__(values)
        parts: list[str] = []
        end = position = 0
        for match in _PERCENT.finditer(self):
            parts.append(self[end : match.start()])
            end = match.end()
            if match["kind"] == "%":
                parts.append(self[end - 1 : end])
                continue
            if match["name"] is not None:
                value = dict(values)[match["name"]]
            elif isinstance(values, tuple):
                value, position = values[position], position + 1
            else:
                value = values
            parts.append(TemplateText.of_value(value))
        result = TemplateText.concat([*parts, self[end:]])
        return result if self._all_owned and str.__eq__(result, text) else TemplateText(text)

    def __rmod__(self, other: str) -> "TemplateText":
        return TemplateText(other) % self if isinstance(other, str) else NotImplemented

    def lstrip(self, chars: str | None = None) -> "TemplateText":
        """As `str.lstrip`. Each character that stays keeps its `owned` byte."""
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None) -> "TemplateText":
        """As `str.rstrip`. Each character that stays keeps its `owned` byte."""
        return self[: len(super().rstrip(chars))]

    def strip(self, chars: str | None = None) -> "TemplateText":
        """As `str.strip`. Each character that stays keeps its `owned` byte."""
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> "TemplateText":
        """As `str.removeprefix`. Each character that stays keeps its `owned` byte."""
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str) -> "TemplateText":
        """As `str.removesuffix`. Each character that stays keeps its `owned` byte."""
        return self[: len(super().removesuffix(suffix))]

    def _located(self, parts: Iterable[str], separator: str | None) -> list["TemplateText"]:
        """Parts that stand in this order, with a separator or with blanks between them."""
        located, position = [], 0
        for part in parts:
            start = position if separator is not None else self.find(part, position)
            located.append(self[start : start + len(part)])
            position = start + len(part) + len(separator or "")
        return located

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["TemplateText"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `str.split`. Each part is a slice of this text, with the `owned` bytes of the slice."""
        return self._located(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["TemplateText"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `str.rsplit`. Each part is a slice of this text, with the `owned` bytes of the slice."""
        return self._located(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list["TemplateText"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `str.splitlines`. Each line is a slice of this text, with the `owned` bytes of the slice."""
        lines = self._located(super().splitlines(True), "")
        return lines if keepends else [line[: len(str.splitlines(line)[0])] for line in lines]

    def partition(self, sep: str) -> tuple["TemplateText", "TemplateText", "TemplateText"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `str.partition`. All three parts are slices of this text, and so is the separator."""
        before, found, _ = super().partition(sep)
        return self._cut(len(before), len(found))

    def rpartition(self, sep: str) -> tuple["TemplateText", "TemplateText", "TemplateText"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `str.rpartition`. All three parts are slices of this text, and so is the separator."""
        before, found, _ = super().rpartition(sep)
        return self._cut(len(before), len(found))

    def _cut(self, start: int, length: int) -> tuple["TemplateText", "TemplateText", "TemplateText"]:
        return self[:start], self[start : start + length], self[start + length :]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> "TemplateText":  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `str.replace`. Each copy of `new` has the owners of `new`, and the rest keeps its own.

        With an empty `old` the result is the template's only where both texts are wholly the template's.
        """
        if not old:
            return self._whole(super().replace(old, new, count), new)
        return TemplateText(new).join(self.split(old, count))

    def join(self, iterable: Iterable[str], /) -> "TemplateText":
        """As `str.join`. Each part and each separator keeps its `owned` bytes. A plain `str` is the request's."""
        parts = list(iterable)
        between = itertools.chain.from_iterable((self, part) for part in parts[1:])
        return TemplateText.concat([*parts[:1], *between])

    def _recased(self, recase: Callable[[str], str]) -> "TemplateText":
        """Run by run, unless a letter's new form depends on letters around it."""
        text = recase(self)
        runs, start = [], 0
        for owner, run in itertools.groupby(self.owned):
            end = start + sum(1 for _ in run)
            part = recase(str.__getitem__(self, slice(start, end)))
            runs.append(TemplateText(part, bytes([owner]) * len(part)))
            start = end
        result = TemplateText.concat(runs)
        return result if str.__eq__(result, text) else self._whole(text)

    def upper(self) -> "TemplateText":
        """As `str.upper`. The new letters belong to the owner of the letter that they come from."""
        return self._recased(str.upper)

    def lower(self) -> "TemplateText":
        """As `str.lower`. The new letters belong to the owner of the letter that they come from.

        A Greek sigma has another form at the end of a word. Where that end is where the owner changes, all becomes the
        request's.
        """
        return self._recased(str.lower)

    def casefold(self) -> "TemplateText":
        """As `str.casefold`. The new letters belong to the owner of the letter that they come from."""
        return self._recased(str.casefold)

    def swapcase(self) -> "TemplateText":
        """As `str.swapcase`. The new letters belong to the owner of the old ones, with the exception of `lower`."""
        return self._recased(str.swapcase)

    def capitalize(self) -> "TemplateText":
        """As `str.capitalize`. Where each owner's runs alone would give another text, all becomes the request's."""
        return self._recased(str.capitalize)

    def title(self) -> "TemplateText":
        """As `str.title`. Where each owner's runs alone would give another text, all becomes the request's."""
        return self._recased(str.title)

    def center(self, width: SupportsIndex, fillchar: str = " ", /) -> "TemplateText":
        """As `str.center`. The result is the template's only where text and `fillchar` are wholly the template's."""
        return self._whole(super().center(width, fillchar), fillchar)

    def ljust(self, width: SupportsIndex, fillchar: str = " ", /) -> "TemplateText":
        """As `str.ljust`. This text keeps its owners. The filling is the template's only where both texts are."""
        return self + self._whole(super().ljust(width, fillchar), fillchar)[len(self) :]

    def rjust(self, width: SupportsIndex, fillchar: str = " ", /) -> "TemplateText":
        """As `str.rjust`. This text keeps its owners. The filling is the template's only where both texts are."""
        padded = self._whole(super().rjust(width, fillchar), fillchar)
        return padded[: len(padded) - len(self)] + self

    def zfill(self, width: SupportsIndex, /) -> "TemplateText":
        """As `str.zfill`. The result is the template's only where this text is wholly the template's."""
        return self._whole(super().zfill(width))

    def expandtabs(self, tabsize: SupportsIndex = 8) -> "TemplateText":  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `str.expandtabs`. The result is the template's only where this text is wholly the template's."""
        return self._whole(super().expandtabs(tabsize))

    def translate(self, table: Any, /) -> "TemplateText":
        """As `str.translate`. The whole result counts as the request's."""
        return TemplateText(super().translate(table))

    def format(self, *args: Any, **kwargs: Any) -> "TemplateText":  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `str.format`. The whole result counts as the request's."""
        return TemplateText(super().format(*args, **kwargs))

    def format_map(self, mapping: Any, /) -> "TemplateText":  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `str.format_map`. The whole result counts as the request's."""
        return TemplateText(super().format_map(mapping))
