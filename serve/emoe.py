"""`emoe`: the console script. Each command is a `python -m` too."""

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "serve": "serve a model over an OpenAI-compatible HTTP API (python -m serve.main)",
    "plan": "what a model needs of a device, and how fast it is there at best (python -m serve.plan)",
    "doctor": "what of this machine would keep the server from running well (python -m serve.doctor)",
}
MODULES = {"serve": "serve.main", "plan": "serve.plan", "doctor": "serve.doctor"}
"""Each has a `main` that takes the arguments and how it was called. Imported when it is called: that takes a moment."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; the exit status, 2 for a mistake named in one line on stderr."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if command in ("-h", "--help"):
        print("usage: emoe COMMAND ...\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<10} {purpose}")
        print(f"  {'--version':<10} print the version\n\n`emoe COMMAND --help` lists a command's flags.")
        return 0
    if command == "--version":
        import emoe_jax

        print(f"emoe-jax {emoe_jax.__version__}")
        return 0
    if command in COMMANDS:
        return importlib.import_module(MODULES[command]).main(rest, f"emoe {command}")
    problem = "no command was given"
    if command:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        problem = f"there is no command {command[:40]!r}" + (f", did you mean {close[0]!r}?" if close else "")
    print(f"error: {problem}; expected one of {', '.join(COMMANDS)}, or --version, or --help", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
