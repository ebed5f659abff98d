"""An option is written once, and is in --help, the configuration file, `Engine.load` and the reference page."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from emoe_jax import ConfigError, Engine, EngineConfig
from emoe_jax.engine import keywords
from emoe_jax.option_fields import Options, option, options_of
from serve.flags import Parser, parser_of, read_values
from serve.options import TITLES, ServerOptions, parse_options
from serve.reference import COMMAND, page

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "options.md"


@dataclasses.dataclass(frozen=True, kw_only=True)
class More(EngineConfig):
    """The engine's options, and new ones of every kind."""

    warmth: int = option(7, "how warm it is", low=0, high=9, metavar="DEGREES")
    weather: Literal["sun", "rain"] = option("sun", "what it is like outside")
    umbrella: bool = option(False, "whether one is taken along")
    places: list[str] = option([], "where one goes", metavar="PLACE")
    plain: int = 3


TITLES_OF_MORE = {EngineConfig: "engine", More: "weather"}


def parser(kind: type[Options] = More) -> Parser:
    return parser_of(kind, "test", "A test.", TITLES_OF_MORE)


def test_a_new_option_is_in_the_help() -> None:
    text = " ".join(parser().format_help().split())
    assert "--warmth DEGREES how warm it is (default: 7)" in text
    assert "--weather {sun,rain} what it is like outside (default: sun)" in text
    assert "--umbrella, --no-umbrella whether one is taken along (default: false)" in text
    assert "--places PLACE [PLACE ...]" in text
    assert "--plain PLAIN" in text


def test_a_new_option_is_a_flag_and_a_key_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weather.yaml"
    path.write_text("warmth: 5\nweather: rain\numbrella: true\nplaces: [a, b]\nplain: 4\nmax-num-seqs: 3\n")
    found = More(**read_values(parser(), More, ["--config", str(path), "--warmth", "6", "--places", "c"]))
    assert (found.warmth, found.weather, found.umbrella, found.places) == (6, "rain", True, ["c"])
    assert (found.plain, found.max_num_seqs, found.seed) == (4, 3, 0)
    assert not read_values(parser(), More, ["--config", str(path), "--no-umbrella"])["umbrella"]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("warmth: 10", [], "--warmth is '10'; expected an integer between 0 and 9"),
        ("warmt: 5", [], "unknown option 'warmt'; the nearest known one is 'warmth'"),
        ("umbrella: 1", [], "umbrella is '1'; expected true or false"),
        ("", ["--weather", "snow"], "--weather is 'snow'; expected one of sun, rain"),
        ("", ["--warmths", "4"], "unknown option '--warmths'; the nearest known one is '--warmth'"),
        ("", ["rain"], "unknown option 'rain'"),
    ],
)
def test_mistakes_with_a_new_option_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, arguments: list[str], message: str
) -> None:
    path = tmp_path / "weather.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as exit_status:
        read_values(parser(), More, ["--config", str(path), *arguments])
    assert exit_status.value.code == 2
    where = f"--config {path}: " if content else ""
    assert capsys.readouterr().err == f"error: {where}{message}\n"


def test_a_new_option_is_a_keyword_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keywords, "EngineConfig", More)
    load: Any = Engine.load  # type checkers know the options of `EngineConfig` only
    with pytest.raises(ConfigError, match="warmth is 10; expected at most 9"):
        load("/nonexistent", warmth=10)
    with pytest.raises(ConfigError, match="unknown option 'wamrth'; the nearest known one is 'warmth'"):
        load("/nonexistent", wamrth=1)


def test_a_new_option_is_on_the_reference_page() -> None:
    text = page(More, TITLES_OF_MORE)
    assert "| `--warmth` | an integer between 0 and 9 | `7` | how warm it is |" in text
    assert "| `--weather` | one of sun, rain | `sun` | what it is like outside |" in text


def test_the_reference_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(ServerOptions, TITLES), f"run `{COMMAND}`"


def test_the_reference_page_has_every_option() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{one.flag}` |" in text for one in options_of(ServerOptions))


def test_every_option_of_the_engine_is_a_flag(tmp_path: Path) -> None:
    """The two that had been keywords only are flags, too."""
    options = parse_options(["--model", "x", "--kv-memory", "1GiB", "--router-capacity-factor", "2"])
    assert (options.kv_memory, options.router_capacity_factor) == ("1GiB", 2.0)
    assert isinstance(options, EngineConfig)


def test_none_is_no_predictor(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("predictor: none\n")
    options = parse_options(["--config", str(path), "--task-profile", "none", "--model", "x"])
    assert (options.predictor, options.task_profile) == (None, None)
