"""`emoe`: the console script. `serve/commands.py` has its commands, each of which is a `python -m` too."""

import sys
from collections.abc import Sequence

from serve.commands import COMMANDS, dispatch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; the exit status, 2 for a mistake named in one line on stderr."""
    given = sys.argv[1:] if arguments is None else arguments
    if list(given[:1]) == ["--version"]:
        import emoe_jax

        print(f"emoe-jax {emoe_jax.__version__}")
        return 0
    return dispatch("emoe", COMMANDS, given, ["  --version  print the version"])


if __name__ == "__main__":
    sys.exit(main())
