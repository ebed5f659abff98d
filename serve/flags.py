"""Command line and YAML file of a class of options: one flag and one key for each field."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from emoe_jax.errors import ConfigError
from emoe_jax.option_fields import Option, Options, nearest, options_of

Kind = TypeVar("Kind", bound=Options)

CONFIG = "--config"

_ARGUMENT = re.compile(r"^argument (--[\w-]+): (?=\1\b)|^argument (?=--)")
"""What `argparse` puts before a message. Messages of options begin with the flag, as those of the library do."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text, and exits with status 2."""

    where = ""
    """What goes before a message: the file that arguments are from."""
    kind: type[Options] | None = None
    """The class of options that flags are of."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake to stderr, after the file's name where it came from a file, and exit."""
        print(f"error: {self.where}{_ARGUMENT.sub('', message)}", file=sys.stderr)
        raise SystemExit(2)

    def values(self, arguments: Sequence[str]) -> dict[str, Any]:
        """What the arguments say, without defaults."""
        values, unknown = self.parse_known_args(_join_negatives(arguments))
        if unknown:
            flag = unknown[0].partition("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            hint = f"; the nearest known one is {nearest(flag, known)!r}" if flag.startswith("--") else ""
            self.error(f"unknown option {flag[:40]!r}{hint}")
        return vars(values)


def parser_of(kind: type[Options], prog: str, description: str, titles: dict[type, str]) -> Parser:
    """A parser with a flag for each option, and `--config`. `titles` name the groups by the classes with the fields."""
    parser = Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.kind = kind
    groups = {owner: parser.add_argument_group(title) for owner, title in titles.items()}
    for option in options_of(kind):
        _add(groups.get(option.owner, parser), option)
    parser.add_argument(CONFIG, metavar="FILE", help="YAML file with any of these options, by the same names")
    return parser


def read_values(parser: Parser, kind: type[Options], arguments: Sequence[str]) -> dict[str, Any]:
    """What flags and the file given with `--config` say; flags win. Exits with one line on any mistake."""
    given = parser.values(arguments)
    path = given.pop("config", None)
    return given if path is None else _file_values(parser, kind, Path(path)) | given


def flag_names(message: str, kind: type[Options]) -> str:
    """An error of the library with options' names as flags: `max_num_seqs` is `--max-num-seqs`."""
    names = [option.name for option in options_of(kind) if "_" in option.name]
    pattern = rf"(?<![\w/.-])({'|'.join([*names, 'expert memory'])})(?![\w/.-])"
    return re.sub(pattern, lambda match: "--" + re.sub("[_ ]", "-", match[0]), message)


def _add(parser: argparse._ActionsContainer, option: Option) -> None:
    default = option.default_shown
    text = option.traits.help + ("" if default is None else f" (default: {default})")
    about: dict[str, Any] = {"help": text.replace("%", "%%")}
    if option.is_flag:
        parser.add_argument(option.flag, action=argparse.BooleanOptionalAction, **about)
        return
    about |= {"type": _converter(option), "metavar": option.traits.metavar}
    if option.is_choice:
        about["metavar"] = "{" + ",".join(option.shown_words) + "}"
    if option.is_list:
        about |= {"nargs": "+", "action": "extend"}
    parser.add_argument(option.flag, **about)


def _converter(option: Option) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return option.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _join_negatives(arguments: Sequence[str]) -> list[str]:
    """`--flag -5%` as `--flag=-5%`, so that the value is refused and not taken for another flag."""
    joined: list[str] = []
    for argument in arguments:
        if re.match(r"-[0-9.]", argument) and joined and re.fullmatch(r"--[a-z-]+", joined[-1]):
            joined[-1] += "=" + argument
        else:
            joined.append(argument)
    return joined


def _file_values(parser: Parser, kind: type[Options], path: Path) -> dict[str, Any]:
    """What the file says, read as arguments, so that both are checked by the same rules."""
    parser.where = f"{CONFIG} {path}: "
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        parser.error(getattr(error, "strerror", None) or "not a UTF-8 text file")
    except yaml.YAMLError as error:
        parser.error(f"not valid YAML: {' '.join(str(error).split())}")
    content = {} if content is None else content
    if not isinstance(content, dict):
        parser.error(f"expected a mapping of options, found {type(content).__name__}")
    known = {option.name: option for option in options_of(kind)}
    arguments: list[str] = []
    for key, value in content.items():
        option = known.get(str(key).replace("-", "_"))
        if option is None:
            parser.error(f"unknown option {str(key)!r}; the nearest known one is {nearest(str(key), known)!r}")
        if value is None:
            continue
        if isinstance(value, list | dict) and not option.takes(type(value)):
            found = "a list" if isinstance(value, list) else "a mapping"
            parser.error(f"{option.flag[2:]} is {found}; expected {option.values}")
        if not option.is_flag:
            arguments += _as_arguments(option.flag, value)
        elif isinstance(value, bool):
            arguments.append(option.flag if value else f"--no-{option.flag[2:]}")
        else:
            parser.error(f"{option.flag[2:]} is {str(value)[:40]!r}; expected true or false")
    values = parser.values(arguments)
    parser.where = ""
    return values


def _as_arguments(flag: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [flag, *map(str, value)]
    if isinstance(value, dict):
        value = json.dumps(value)
    return [f"{flag}={value}"]
