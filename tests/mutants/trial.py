"""`Trial`: mutants tried one by one in copies of the repository, several at a time."""

import os
import queue
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from tests.mutants.mutant import Mutant, StaleMutant
from tests.mutants.pytest_run import Run, matches, run_pytest
from tests.mutants.trees import copy_tree

Verdict = Literal["killed", "survived", "stale", "broken", "hung", "failing"]
"""`survived`: its tests pass. `stale`: the source has changed. `broken`: its tests crash, and no assertion fails.
`hung`: they do not end. `failing`: they do not pass without the cut either."""


class Outcome(NamedTuple):
    """What became of a mutant. `detail` is one line: the test that noticed, or what is wrong."""

    mutant: Mutant
    verdict: Verdict
    seconds: float
    detail: str

    @property
    def is_killed(self) -> bool:
        return self.verdict == "killed"


def try_mutants(
    root: Path,
    files: Sequence[str],
    mutants: Sequence[Mutant],
    *,
    jobs: int,
    timeout: float,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """The outcome of each mutant, in their order. `timeout` is in seconds, for one mutant's tests.

    All listed tests run once without a cut, so that a test that always fails kills nothing. `on_outcome` may be called
    from any thread. All runs share one cache of compilations, that of `JAX_COMPILATION_CACHE_DIR` where it is set.
    """
    with tempfile.TemporaryDirectory(prefix="emoe-mutants-") as folder:
        compilations = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path(folder) / "compilations")
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for job in range(max(1, min(jobs, len(mutants)))):
            trees.put(copy_tree(root, files, Path(folder) / f"tree{job}"))

        def run(tree: Path, tests: Sequence[str], seconds: float, first_only: bool) -> Run:
            return run_pytest(tree, tests, compilations=compilations, timeout=seconds, first_only=first_only)

        tree = trees.get()
        listed = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        uncut = run(tree, listed, timeout * len(listed), first_only=False)
        trees.put(tree)

        def one(mutant: Mutant) -> Outcome:
            tree = trees.get()
            try:
                outcome = _try(mutant, tree, uncut, run, timeout)
            finally:
                trees.put(tree)
            on_outcome(outcome)
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, mutants))


def _try(
    mutant: Mutant, tree: Path, uncut: Run, run: Callable[[Path, Sequence[str], float, bool], Run], timeout: float
) -> Outcome:
    if (wrong := _wrong_without_cut(mutant, uncut)) is not None:
        return Outcome(mutant, "failing", 0.0, wrong)
    path = tree / mutant.file
    try:
        cut = mutant.source(tree)
    except StaleMutant as error:
        return Outcome(mutant, "stale", 0.0, str(error))
    original = path.read_bytes()
    try:
        path.write_text(cut, encoding="utf-8")
        found = run(tree, mutant.tests, timeout, True)
    finally:
        path.write_bytes(original)
    return Outcome(mutant, *_judged(found))


def _wrong_without_cut(mutant: Mutant, uncut: Run) -> str | None:
    """Why the listed tests could not kill anything; None where all of them pass without the cut."""
    if uncut.trouble is not None:
        return f"without the cut, {uncut.trouble}"
    for listed in mutant.tests:
        ran = [test for test in uncut.tests if matches(listed, test.test)]
        bad = next((test for test in ran if test.result != "passed"), None)
        if bad is not None:
            return f"{bad.test} {bad.result} without the cut: {bad.message}"
        if not ran:
            return f"{listed} did not run"
    return None


def _judged(found: Run) -> tuple[Verdict, float, str]:
    failed = next((test for test in found.tests if test.result == "failed"), None)
    if failed is not None:
        return "killed", found.seconds, failed.test
    if found.timed_out:
        return "hung", found.seconds, str(found.trouble)
    crashed = next((test for test in found.tests if test.result == "crashed"), None)
    if crashed is not None:
        return "broken", found.seconds, f"{crashed.test} crashed: {crashed.message}"
    if found.trouble is not None:
        return "broken", found.seconds, found.trouble
    return "survived", found.seconds, "all of its tests pass"
