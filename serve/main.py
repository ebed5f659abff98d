"""python -m serve.main: load a model and serve it."""

import sys
from collections.abc import Sequence

from serve.interrupt import exit_on_signal
from serve.options import COMMAND, parse_options, parser

__all__ = ["main", "parser"]


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Runs until a signal; the exit status, 2 for a mistake that one line on stderr has named.

    `command` is how it was called, for the help text.
    """
    with exit_on_signal() as stop_watching:
        options = parse_options(sys.argv[1:] if arguments is None else arguments, command)
        from serve.start import run  # takes seconds, in which Ctrl-C shall work too

        return run(options, on_loaded=stop_watching)


if __name__ == "__main__":
    sys.exit(main())
