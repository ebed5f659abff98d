"""`emoe completion bash|zsh|fish`: a script with which a shell completes the commands, their flags and words."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from emoe_jax.errors import ConfigError
from emoe_jax.option_fields import options_of
from serve.commands import COMMANDS, Command
from serve.exits import OK, status_of
from serve.flags import Parser

COMMAND = "python -m serve.command.completion"
Shell = Literal["bash", "zsh", "fish"]
FILES = ("FILE", "FILE.npz", "OUT", "PATH")
FOLDERS = ("DIR", "MODEL", "TARGET")
"""What a value stands for, by its name in usage texts."""

HOW_TO = """\
bash: emoe completion bash > ~/.local/share/bash-completion/completions/emoe
zsh:  emoe completion zsh > "${fpath[1]}/_emoe"
fish: emoe completion fish > ~/.config/fish/completions/emoe.fish"""


def parser(command: str = COMMAND) -> Parser:
    """The command line."""
    made = Parser(
        prog=command,
        description="Print the script with which a shell completes the commands and flags of `emoe`.",
        epilog=HOW_TO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("shell", choices=get_args(Shell), help="the shell that is to read the script")
    return made


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Print the script; the exit status."""
    given = parser(command).values(sys.argv[1:] if arguments is None else arguments)
    return status_of(lambda: _run(given["shell"]))


def _run(shell: Shell) -> int:
    print(script(shell))
    return OK


def script(shell: Shell) -> str:
    """The script. Raises `ConfigError` where the package that writes it is not installed."""
    try:
        import shtab
    except ModuleNotFoundError:
        raise ConfigError("the package shtab is missing: pip install 'emoe-jax[completion]'") from None
    root = argparse.ArgumentParser(prog="emoe", description="Serve Mixture-of-Experts models")
    root.add_argument("--version", action="store_true", help="print the version")
    _add(root, COMMANDS, "emoe")
    return shtab.complete(root, shell)


def _add(to: argparse.ArgumentParser, commands: Mapping[str, Command], called: str) -> None:
    """The commands as parts of a parser, made of their own parsers."""
    parts = to.add_subparsers()
    for name, command in commands.items():
        if command.parts:
            _add(parts.add_parser(name, help=command.purpose), command.parts, f"{called} {name}")
        else:
            own = completable(command.load().parser(f"{called} {name}"))
            parts.add_parser(name, help=command.purpose, parents=[own], add_help=False)


def completable(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with words, files and folders for a shell to offer. It is not to be used for parsing any more."""
    import shtab

    kind = getattr(made, "kind", None)
    words = {} if kind is None else {one.flag: one.shown_words for one in options_of(kind) if not one.is_flag}
    for action in made._actions:
        action.help = (action.help or "").replace("%%", "per cent")
        flag = next(iter(action.option_strings), "")
        if action.metavar in FILES:
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
        elif action.metavar in FOLDERS:
            action.complete = shtab.DIRECTORY  # pyright: ignore[reportAttributeAccessIssue]
        elif words.get(flag):
            action.choices = words[flag]
    return made


if __name__ == "__main__":
    sys.exit(main())
