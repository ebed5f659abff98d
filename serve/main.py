"""python -m serve.main: load a model and serve it."""

import gc
import sys
from collections.abc import Sequence

from serve import start_clock  # first, as its clock begins now
from serve.interrupt import exit_on_signal
from serve.options import COMMAND, parse_options, parser

__all__ = ["main", "parser"]


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Runs until a signal; the exit status, 2 for a mistake that one line on stderr has named.

    `command` is how it was called, for the help text.
    """
    gc.disable()  # until the server is up: a start makes many objects and little garbage, and searching them takes long
    try:
        with exit_on_signal() as stop_watching:
            clock = start_clock.StartClock()
            options = parse_options(sys.argv[1:] if arguments is None else arguments, command)
            from serve.start import run  # takes seconds, in which Ctrl-C shall work too

            return run(options, stop_watching, clock)
    finally:
        gc.enable()


if __name__ == "__main__":
    sys.exit(main())
