"""One run of pytest in a copy of the repository, and what became of each test."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree import ElementTree

Result = Literal["passed", "failed", "crashed", "skipped"]
"""`failed`: an assertion did not hold. `crashed`: any other exception, which says nothing about what is asserted."""

_ASSERTIONS = ("assert ", "AssertionError", "Failed: ")  # how pytest begins the message of each


class Ran(NamedTuple):
    """One test: its node id, what became of it, and the first line of what went wrong."""

    test: str
    result: Result
    message: str


class Run(NamedTuple):
    """Tests that ran, in order; `trouble` is one line where pytest itself could not do what it was told."""

    tests: tuple[Ran, ...]
    seconds: float
    trouble: str | None
    timed_out: bool = False


def run_pytest(tree: Path, tests: Sequence[str], *, compilations: Path, timeout: float, first_only: bool) -> Run:
    """Run these tests in `tree` until the first one fails, or all of them. `compilations` is a cache that runs share.

    Nothing is written beside the sources: a compiled module could outlive the mutant that it was compiled from.
    """
    report = tree / "junit.xml"
    report.unlink(missing_ok=True)
    # Annotations are not checked: a cut may break one, which says nothing about what is asserted.
    unchecked = ["-o", "addopts=", "-p", "no:cacheprovider"]
    options = ["-q", "--tb=short", *unchecked, f"--junitxml={report}", *(["-x"] if first_only else [])]
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(compilations),
    }
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return Run((), time.monotonic() - began, f"no result after {timeout:g} s", timed_out=True)
    seconds = time.monotonic() - began
    ran = tuple(_read(report)) if report.exists() else ()
    trouble = None
    if done.returncode not in (0, 1) or not ran:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("E ", "ERROR"))]
        trouble = " ".join((errors or lines or [f"pytest ended with {done.returncode}"])[0].split())
    return Run(ran, seconds, trouble)


def matches(listed: str, test: str) -> bool:
    """Whether a test is the listed one, one of its parameters, or in the listed file."""
    return test == listed or test.startswith((f"{listed}[", f"{listed}::"))


def _read(report: Path) -> Iterable[Ran]:
    for case in ElementTree.parse(report).iter("testcase"):
        test = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        wrong = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if wrong is None:
            yield Ran(test, "passed", "")
            continue
        message = (wrong.get("message") or "").strip()
        result: Result = "crashed"
        if wrong.tag == "skipped":
            result = "skipped"
        elif wrong.tag == "failure" and message.startswith(_ASSERTIONS):
            result = "failed"
        yield Ran(test, result, next(iter(message.splitlines()), ""))
