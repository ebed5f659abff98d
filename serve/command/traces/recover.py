"""`emoe traces recover FILE`: finish the trace of a process that was killed while it recorded."""

import dataclasses
import json
import sys
from collections.abc import Sequence

from emoe_jax.option_fields import Options, option
from emoe_jax.traces.recorder import recover
from serve.exits import OK, status_of
from serve.flags import Parser, parser_of, read_values

COMMAND = "python -m serve.command.traces.recover"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoverOptions(Options):
    """What `emoe traces recover` is told, beside the trace."""

    json: bool = option(False, "whether to print JSON instead of a line")


def parser(command: str = COMMAND) -> Parser:
    """The command line."""
    description = "Make the trace of what a killed process left in FILE.parts."
    made = parser_of(RecoverOptions, command, description, {RecoverOptions: "recover"})
    made.add_argument("trace", metavar="FILE", help="the name that the recording was given (.npz)")
    return made


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Finish the trace, and print how many tokens it has; the exit status."""
    given = read_values(parser(command), RecoverOptions, sys.argv[1:] if arguments is None else arguments)
    path = given.pop("trace")
    return status_of(lambda: _run(path, RecoverOptions(**given)))


def _run(path: str, options: RecoverOptions) -> int:
    tokens = recover(path)
    print(json.dumps({"trace": path, "tokens": tokens}) if options.json else f"{path}: {tokens:,} tokens")
    return OK


if __name__ == "__main__":
    sys.exit(main())
