"""What the exit status of a command says, and how errors become one."""

import sys
from collections.abc import Callable

from emoe_jax.errors import EmoeError, one_line
from serve.interrupt import INTERRUPTED

OK, NO, MISTAKE, NO_DEVICE = 0, 1, 2, 3

MEANINGS = {
    OK: "the command did what it was asked for",
    NO: "the command ran, and its answer is no; the table below says of what",
    MISTAKE: "a mistake in the arguments or in a file, or a server that cannot be reached; one line on stderr names it",
    NO_DEVICE: "this machine lacks the device that the command is about",
    INTERRUPTED: "Ctrl-C; a server that serves ends its requests, and with 0",
}
"""Of all commands alike."""


def status_of(run: Callable[[], int], in_flags: Callable[[str], str] = str) -> int:
    """What `run` returns. An error that a user can cause becomes one line on stderr, in which `in_flags` puts flags for
    names of options, and Ctrl-C ends without a traceback."""
    try:
        return run()
    except (EmoeError, ImportError, OSError) as error:
        print(f"error: {in_flags(one_line(error))}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
