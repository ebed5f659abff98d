"""Options of a frozen dataclass. A field says once what its values may be, its default and one line of help.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings(Options):
        retries: int = option(3, "how often a read is tried", low=1, high=10)

`Settings(retries=0)` raises `ConfigError`: `retries is 0; expected at least 1`. Command lines, configuration files and
reference pages are made from `options_of(Settings)`. A plain field without `option` is an option, too.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeVar

from emoe_jax.errors import ConfigError, EmoeError

T = TypeVar("T")

Check = Callable[[Any, str], Any]
"""Called with a value and its name: the value to keep, or `ConfigError` where the value is none."""

_SHOWN = 40
"""Characters of a wrong value that a message repeats."""

_EMPTY = "an empty text is none"
_MAPPING = 'a JSON object such as {"name": "value"}'


class Bounds(NamedTuple):
    """The numbers from `low` to `high`, without `low` itself where `open_low` is set. None leaves a side open."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False

    def missed_by(self, value: float) -> str | None:
        """What would be right, where the value is outside or not finite; None where it is inside."""
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if self.low is not None and (value < self.low or (self.open_low and value == self.low)):
            return f"more than {self.low}" if self.open_low else f"at least {self.low}"
        if self.high is not None and value > self.high:
            return f"at most {self.high}"
        return None

    @property
    def interval(self) -> str:
        """`[0, 1]`, or `(0, 1]` where 0 is none of them. Both sides are bounded."""
        return f"{'(' if self.open_low else '['}{_plain(self.low)}, {_plain(self.high)}]"

    def __str__(self) -> str:
        """` between 1 and 8`, ` of at least 1`, or nothing."""
        if self.low is None:
            return "" if self.high is None else f" of at most {self.high}"
        if self.high is None:
            return f" of {'more than' if self.open_low else 'at least'} {self.low}"
        if self.open_low:
            return f" above {self.low} and up to {self.high}"
        return f" between {self.low} and {self.high}"


class Traits(NamedTuple):
    """What a field says of itself beside its type and default; see `option`."""

    help: str = ""
    bounds: Bounds = Bounds()
    metavar: str | None = None
    default_text: str | None = None
    noun: str | None = None
    hidden: tuple[str, ...] = ()
    check: Check | None = None


def option(
    default: T,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    metavar: str | None = None,
    default_text: str | None = None,
    noun: str | None = None,
    hidden: tuple[str, ...] = (),
    check: Check | None = None,
) -> T:
    """A dataclass field that is an option.

    Numbers are `low` to `high`, without `low` where `open_low` is set. `metavar` stands for the value in usage texts,
    `default_text` for the default, and `noun` says what a text has to be ("a file"). Choices that are `hidden` are
    taken, and not shown. `check` sees what has the right type.
    """
    traits = Traits(help, Bounds(low, high, open_low), metavar, default_text, noun, hidden, check)
    metadata = {"traits": traits}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)  # pyright: ignore[reportReturnType]
    return dataclasses.field(default=default, metadata=metadata)


class _Unfit(ValueError):
    """A value of another kind: what would have been right."""


class _OutOfBounds(_Unfit):
    """A number that is too small or too large."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a class of options."""

    name: str
    hint: Any
    default: Any
    traits: Traits
    owner: type
    """The class whose body has the field."""

    @property
    def flag(self) -> str:
        """The command-line flag, `--with-dashes`."""
        return "--" + self.name.replace("_", "-")

    @functools.cached_property
    def members(self) -> tuple[Any, ...]:
        """The types of a union, or the one type there is."""
        is_union = typing.get_origin(self.hint) in (typing.Union, types.UnionType)
        return typing.get_args(self.hint) if is_union else (self.hint,)

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """Texts that stand for themselves. `none` is among them where None is a value other than the default."""
        words = tuple(
            word for one in self.members if typing.get_origin(one) is Literal for word in typing.get_args(one)
        )
        return (*words, "none") if self._takes_none and "none" not in words else words

    @property
    def shown_words(self) -> tuple[str, ...]:
        """`words` without the hidden ones, for help texts and messages."""
        return tuple(word for word in self.words if word not in self.traits.hidden)

    @property
    def is_flag(self) -> bool:
        """Whether true and false are among the values."""
        return bool in self.members

    @property
    def is_list(self) -> bool:
        """Whether values are lists of texts. Then `parse` reads one item of the list."""
        return self._has(list)

    def takes(self, kind: type) -> bool:
        """Whether values of this type, such as `dict`, are among the values."""
        return self._has(kind)

    @property
    def is_choice(self) -> bool:
        """Whether the words are all there is."""
        return bool(self.words) and all(one is type(None) or typing.get_origin(one) is Literal for one in self.members)

    @property
    def values(self) -> str:
        """What a value is: `an integer between 1 and 4096, or auto`."""
        kinds: list[str] = []
        if self.is_flag:
            kinds.append("true or false")
        if self._has(list):
            kinds.append(self.traits.noun or "a list of texts")
        elif self._takes_text:
            kinds.append(self.traits.noun or "a text")
        elif float in self.members:
            kinds.append(f"a number{self.traits.bounds}")
        elif int in self.members:
            kinds.append(f"an integer{self.traits.bounds}")
        if self._has(dict):
            kinds.append(_MAPPING)
        if len(self.shown_words) > 1 and not kinds:
            return f"one of {', '.join(self.shown_words)}"
        return ", or ".join([*kinds, *self.shown_words])

    @property
    def default_shown(self) -> str | None:
        """The default as a user writes it, or the words for it; None where there is nothing to say."""
        if self.traits.default_text is not None:
            return self.traits.default_text
        if isinstance(self.default, bool):
            return str(self.default).lower()
        return None if self.default in (None, "", [], {}) else f"{self.default}"

    def checked(self, value: Any) -> Any:
        """The value to keep. Raises `ConfigError` that names the option, the value and what would be right."""
        try:
            return self._fit(value, self.name)
        except _Unfit as error:
            raise ConfigError(f"{self.name} is {shown(value)}; expected {error}") from None
        except ConfigError as error:
            if self.name in str(error):
                raise
            raise ConfigError(f"{self.name}: {error}") from None

    def parse(self, text: str) -> Any:
        """The value that a text on a command line means. Raises `ConfigError` as `checked` does, with the flag."""
        try:
            if self.is_list:
                return self._item(text, self.flag)
            is_text = text in self.words or self._takes_text
            return self._fit(text if is_text else self._converted(text), self.flag)
        except _Unfit as error:
            right = self.values if isinstance(error, _OutOfBounds) else error
            raise ConfigError(f"{self.flag} is {text[:_SHOWN]!r}; expected {right}") from None
        except ConfigError as error:
            raise ConfigError(str(error) if self.flag in str(error) else f"{self.flag}: {error}") from None

    @property
    def _takes_none(self) -> bool:
        return type(None) in self.members and self.default is not None

    @property
    def _takes_text(self) -> bool:
        return str in self.members

    def _has(self, kind: type) -> bool:
        return any(one is kind or typing.get_origin(one) is kind for one in self.members)

    def _converted(self, text: str) -> Any:
        for kind in (int, float):
            if kind in self.members:
                try:
                    return kind(text)
                except ValueError:
                    continue
        try:
            return json.loads(text) if self._has(dict) else text
        except ValueError:
            raise _Unfit(_MAPPING) from None

    def _fit(self, value: Any, name: str) -> Any:
        if value is None and type(None) in self.members:
            return None
        if isinstance(value, str) and value in self.words:
            return None if value == "none" and self._takes_none else value
        if self.is_list:
            if not isinstance(value, list | tuple):
                raise _Unfit(self.values)
            return [self._item(item, name) for item in value]
        value = self._of_type(value)
        return value if self.traits.check is None else self.traits.check(value, name)

    def _item(self, item: Any, name: str) -> str:
        if not isinstance(item, str):
            raise _Unfit(self.values)
        if not item.strip():
            raise ConfigError(_EMPTY)
        return item if self.traits.check is None else self.traits.check(item, name)

    def _of_type(self, value: Any) -> Any:
        if isinstance(value, bool):
            if self.is_flag:
                return value
        elif isinstance(value, numbers.Integral):
            if int in self.members or float in self.members:
                return self._within(int(value))
        elif isinstance(value, numbers.Real):
            if float in self.members:
                return self._within(float(value))
        elif isinstance(value, str | os.PathLike):
            if self._takes_text:
                if self.traits.check is None and not str(value).strip():
                    raise ConfigError(_EMPTY)
                return value
        elif isinstance(value, Mapping) and self._has(dict):
            return dict(value)
        raise _Unfit(self.values)

    def _within(self, number: float) -> float:
        right = self.traits.bounds.missed_by(number)
        if right is not None:
            raise _OutOfBounds(right)
        return number


@functools.cache
def options_of(kind: type) -> tuple[Option, ...]:
    """The options of a dataclass, in the order of its fields. Raises `TypeError` for a field without a default."""
    hints = typing.get_type_hints(kind)
    options: list[Option] = []
    for field in dataclasses.fields(kind):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        if default is dataclasses.MISSING:
            raise TypeError(f"{kind.__name__}.{field.name} has no default")
        owner = next(base for base in kind.__mro__ if field.name in inspect.get_annotations(base))
        traits = field.metadata.get("traits", Traits())
        options.append(Option(field.name, hints[field.name], default, traits, owner))
    return tuple(options)


class KnownNames:
    """Base of dataclasses that users make: an unknown name is one line with the nearest known one, no `TypeError`."""

    if not TYPE_CHECKING:  # type checkers go by the fields

        def __new__(cls, *values: Any, **named: Any) -> Self:
            known = [field.name for field in dataclasses.fields(cls) if field.init]
            for name in named:
                if name not in known:
                    raise cls._unknown(name, f"{name!r}; the nearest known one is {nearest(name, known)!r}")
            return super().__new__(cls)

    @classmethod
    def _unknown(cls, name: str, problem: str) -> EmoeError:
        """The error for a name that is no field. `problem` has the name and the nearest known one."""
        return ConfigError(f"unknown option {problem}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(KnownNames):
    """Base of classes of options: every name and value is checked when an object is made."""

    def __post_init__(self) -> None:
        for one in options_of(type(self)):
            object.__setattr__(self, one.name, one.checked(getattr(self, one.name)))


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like the given one."""
    return max(known, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())


def _plain(number: float | None) -> str:
    return f"{number:g}" if isinstance(number, float) else f"{number}"


def shown(value: object) -> str:
    """A wrong value as a message repeats it: its first characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        return f"a {type(value).__name__} that is too long to write"
    return text if len(text) <= 2 * _SHOWN else f"{text[: 2 * _SHOWN]}..."
