"""`python -m tests.mutants`: cut each mechanism out of the engine, and see that a test fails.

The cuts are made in temporary copies of the tracked files. The exit status is 1 unless every mutant is killed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tests.mutants.mutant import Mutant
from tests.mutants.report import print_list, print_outcomes, write_outcomes
from tests.mutants.table import MUTANTS
from tests.mutants.trees import NoRepository, tracked_files
from tests.mutants.trial import Outcome, try_mutants

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None, mutants: Sequence[Mutant] = MUTANTS, root: Path = ROOT) -> int:
    """The exit status: 0 where every mutant was killed, 1 where one was not, 2 where none could be tried."""
    given = _parse(argv, mutants)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if given.only is not None:
        mutants = [mutant for mutant in mutants if mutant.name in given.only]
    if given.list:
        print_list(console, mutants)
        return 0
    try:
        files = tracked_files(root)
    except NoRepository as error:
        console.print(str(error), markup=False)
        return 2
    console.print("The tests run once without a cut, which takes longest.")
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("mutants", total=len(mutants))

        def note(outcome: Outcome) -> None:
            progress.advance(bar)
            progress.console.print(f"{outcome.verdict:9} {outcome.seconds:6.1f} s  {outcome.mutant.name}", markup=False)

        outcomes = try_mutants(root, files, mutants, jobs=given.jobs, timeout=given.timeout, on_outcome=note)
    print_outcomes(console, outcomes)
    if given.json is not None:
        write_outcomes(outcomes, given.json)
    return 0 if all(outcome.is_killed for outcome in outcomes) else 1


def _parse(argv: Sequence[str] | None, mutants: Sequence[Mutant]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    add = parser.add_argument
    add("--list", action="store_true", help="name the mutants and try none")
    add("--only", nargs="+", metavar="NAME", help="try these mutants (default: all)")
    cores = os.cpu_count() or 1
    add("--jobs", type=int, default=max(1, cores // 2), metavar="N", help="tried at a time (default: half the cores)")
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds for one mutant's tests (default: 300)")
    add("--json", type=Path, metavar="OUT", help="write the outcomes there")
    given = parser.parse_args(argv)
    if given.jobs < 1:
        parser.error(f"--jobs is {given.jobs}; expected at least 1")
    if not given.timeout > 0:
        parser.error(f"--timeout is {given.timeout:g}; expected more than 0 seconds")
    names = {mutant.name for mutant in mutants}
    if unknown := [name for name in given.only or () if name not in names]:
        parser.error(f"there is no mutant {unknown[0]!r}; --list names them")
    if given.json is not None and not given.json.parent.is_dir():
        parser.error(f"--json {given.json}: its folder does not exist")
    return given


if __name__ == "__main__":
    sys.exit(main())
