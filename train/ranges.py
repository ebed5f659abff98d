"""Bounds of command-line options, checked alike by all training commands."""

import argparse
from collections.abc import Mapping


def check_ranges(
    parser: argparse.ArgumentParser, options: argparse.Namespace, ranges: Mapping[str, tuple[float, float]]
) -> None:
    """End the program with one line when an option that was given lies outside its `(low, high)`."""
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be between {low} and {high}")
