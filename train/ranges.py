"""Command lines of all training commands: mistakes are one line, and bounds of options are checked alike."""

import argparse
import sys
from collections.abc import Mapping
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake to stderr, and exit."""
        print(f"error: {message.removeprefix('argument ')}", file=sys.stderr)
        raise SystemExit(2)


def check_ranges(
    parser: argparse.ArgumentParser, options: argparse.Namespace, ranges: Mapping[str, tuple[float, float]]
) -> None:
    """End the program with one line when an option that was given lies outside its `(low, high)`."""
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be between {low} and {high}")
