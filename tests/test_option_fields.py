"""Options of a dataclass: what values they take, and what is said of others."""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from emoe_jax.errors import ConfigError
from emoe_jax.option_fields import Options, option, options_of


def _even(value: int, name: str) -> int:
    if value % 2:
        raise ConfigError(f"{value} is odd")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Options):
    retries: int = option(3, "how often", low=1, high=10)
    share: float = option(0.5, "how much", low=0, high=1, open_low=True)
    every: int | Literal["auto"] = option("auto", "how seldom", low=1)
    folder: str | Path | Literal["auto"] | None = option("auto", "where", noun="a directory")
    limit: int | None = option(None, "the most", default_text="no limit")
    colour: Literal["red", "green"] | Literal["secret"] = option("red", "which", hidden=("secret",))
    names: list[str] = option([], "who")
    extra: dict[str, Any] = option({}, "what else")
    pairs: int = option(0, "an even number", check=_even)
    loud: bool = False


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"retries": 10}, 10),
        ({"retries": np.int64(4)}, 4),
        ({"share": 1}, 1),
        ({"share": np.float32(0.25)}, 0.25),
        ({"every": "auto"}, "auto"),
        ({"every": 1}, 1),
        ({"folder": "none"}, None),
        ({"folder": None}, None),
        ({"folder": Path("x")}, Path("x")),
        ({"limit": None}, None),
        ({"colour": "secret"}, "secret"),
        ({"names": ("a", "b")}, ["a", "b"]),
        ({"extra": {"x": 1}}, {"x": 1}),
        ({"pairs": 4}, 4),
        ({"loud": True}, True),
    ],
)
def test_values_that_fit_are_kept(given: dict[str, Any], kept: Any) -> None:
    (name,) = given
    assert getattr(Settings(**given), name) == kept


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"retries": 0}, "retries is 0; expected at least 1"),
        ({"retries": 11}, "retries is 11; expected at most 10"),
        ({"retries": "3"}, "retries is '3'; expected an integer between 1 and 10"),
        ({"retries": 2.0}, "retries is 2.0; expected an integer between 1 and 10"),
        ({"retries": True}, "retries is True; expected an integer between 1 and 10"),
        ({"retries": None}, "retries is None; expected an integer between 1 and 10"),
        ({"share": 0}, "share is 0; expected more than 0"),
        ({"share": float("nan")}, "share is nan; expected a finite number"),
        ({"share": [1]}, "share is [1]; expected a number above 0 and up to 1"),
        ({"every": 0}, "every is 0; expected at least 1"),
        ({"every": "often"}, "every is 'often'; expected an integer of at least 1, or auto"),
        ({"folder": 5}, "folder is 5; expected a directory, or auto, or none"),
        ({"folder": " "}, "folder: an empty text is none"),
        ({"limit": "none"}, "limit is 'none'; expected an integer"),
        ({"colour": "blue"}, "colour is 'blue'; expected one of red, green"),
        ({"names": "a"}, "names is 'a'; expected a list of texts"),
        ({"names": ["a", 5]}, "names is ['a', 5]; expected a list of texts"),
        ({"names": ["a", ""]}, "names: an empty text is none"),
        ({"extra": [1]}, 'extra is [1]; expected a JSON object such as {"name": "value"}'),
        ({"pairs": 3}, "pairs: 3 is odd"),
        ({"loud": 1}, "loud is 1; expected true or false"),
        ({"loud": "x" * 500}, f"loud is '{'x' * 79}...; expected true or false"),
    ],
)
def test_values_that_do_not_fit_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(**given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "near"), [("retry", "retries"), ("colours", "colour"), ("zzz", None), ("Loud", "loud"), ("name", "names")]
)
def test_unknown_names_are_told_the_nearest_known_one(name: str, near: str | None) -> None:
    given: dict[str, Any] = {name: 1}
    with pytest.raises(
        ConfigError, match=f"^unknown option '{name}'; the nearest known one is '{near or ''}"
    ) as caught:
        Settings(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("retries", "7", 7),
        ("share", "1e-3", 0.001),
        ("every", "auto", "auto"),
        ("every", "12", 12),
        ("folder", "none", None),
        ("folder", "5", "5"),
        ("colour", "green", "green"),
        ("names", "none", "none"),
        ("extra", '{"a": [1]}', {"a": [1]}),
    ],
)
def test_texts_are_read(name: str, text: str, value: Any) -> None:
    assert {one.name: one for one in options_of(Settings)}[name].parse(text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("retries", "0", "--retries is '0'; expected an integer between 1 and 10"),
        ("retries", "1e3", "--retries is '1e3'; expected an integer between 1 and 10"),
        ("share", "inf", "--share is 'inf'; expected a number above 0 and up to 1"),
        ("every", "-1", "--every is '-1'; expected an integer of at least 1, or auto"),
        ("limit", "", "--limit is ''; expected an integer"),
        ("colour", "blue", "--colour is 'blue'; expected one of red, green"),
        ("extra", "[1]", "--extra is '[1]'; expected a JSON object such as"),
        ("extra", "{", "--extra is '{'; expected a JSON object such as"),
        ("pairs", "3", "--pairs: 3 is odd"),
        ("retries", "9" * 500, f"--retries is '{'9' * 40}'; expected an integer"),
    ],
)
def test_texts_that_do_not_fit_are_named(name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        {one.name: one for one in options_of(Settings)}[name].parse(text)
    assert str(caught.value).startswith(message)


def test_objects_do_not_share_their_lists() -> None:
    first, second = Settings(), Settings()
    first.names.append("x")
    assert second.names == Settings().names == []


def test_a_field_without_a_default_is_no_option() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Lacking(Settings):
        needed: int

    with pytest.raises(TypeError, match=r"Lacking\.needed has no default"):
        options_of(Lacking)
