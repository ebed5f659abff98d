"""`emoe doctor`, which is `python -m serve.doctor`: what of this machine would keep the server from running well.

Exit status: 0 where nothing is a problem (there may be warnings), 1 where something is, 2 for a mistake in the flags.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence

from emoe_jax.errors import one_line
from emoe_jax.option_fields import Options, option
from serve import checks
from serve.checks import Check, Finding, Level
from serve.flags import Parser, parser_of, read_values
from serve.interrupt import INTERRUPTED

COMMAND = "python -m serve.doctor"
HEALTHY, PROBLEM = 0, 1
LEVELS: tuple[Level, ...] = ("ok", "warning", "problem")
"""From the best to the worst."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions(Options):
    """What `emoe doctor` is told."""

    step: bool = option(True, "whether to compile and run a step of a tiny model, which takes the longest")
    json: bool = option(False, "whether to print JSON instead of lines")


def parser(command: str = COMMAND) -> Parser:
    """The command line. `command` is how it was called, for the help text."""
    return parser_of(
        DoctorOptions,
        command,
        "Look at what the server needs of this machine: each line is ok, a warning or a problem, and says how to mend "
        "it. The exit status is 1 where there is a problem.",
        {DoctorOptions: "doctor"},
    )


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Run the checks, and print what they find as they go; the exit status."""
    options = DoctorOptions(
        **read_values(parser(command), DoctorOptions, sys.argv[1:] if arguments is None else arguments)
    )
    findings: list[Finding] = []
    try:
        for finding in examine((*checks.CHECKS, checks.step) if options.step else checks.CHECKS):
            findings.append(finding)
            if not options.json:
                print(as_line(finding), flush=True)
    except KeyboardInterrupt:
        return INTERRUPTED
    worst = max((LEVELS.index(finding.level) for finding in findings), default=0)
    if options.json:
        print(json.dumps({"status": LEVELS[worst], "findings": [one._asdict() for one in findings]}, indent=1))
    return PROBLEM if LEVELS[worst] == "problem" else HEALTHY


def examine(run: Iterable[Check]) -> Iterator[Finding]:
    """The findings of these checks. A check that fails is a problem itself, in one line."""
    logging.getLogger("jax").setLevel(logging.ERROR)  # what it would say here is a finding, or nothing
    _prepare()
    for check in run:
        try:
            yield from check()
        except Exception as error:
            name = check.__name__.replace("_", " ")
            found = f"{type(error).__name__}: {one_line(error)[:300]}"
            yield Finding(name, "problem", found, "mend what the message names, or report it with all lines above")


def as_line(finding: Finding) -> str:
    """One line, and another one where there is something to mend."""
    line = f"{finding.level:<8} {finding.check:<19} {finding.found}"
    return f"{line}\n{'':<8} {'':<19} -> {finding.mend}" if finding.mend else line


def _prepare() -> None:
    """Have JAX start as it does for the server. Where it is missing, the checks say so."""
    try:
        from emoe_jax.memory.device_settings import prepare_devices
        from emoe_jax.memory.plan import machine_memory
        from serve.start import keep_compilations

        prepare_devices(machine_memory())
        keep_compilations()
    except Exception as error:
        logging.getLogger("emoe_jax").debug("not prepared: %s", error)


if __name__ == "__main__":
    sys.exit(main())
