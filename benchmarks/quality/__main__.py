"""`python -m benchmarks.quality`: what answers and texts lose when not all experts are resident.

Accuracy as the eMoE paper defines it (how alike an answer is to that of the fully resident model), exact match with the
true answer, and perplexity with one token per step, as a server decodes. The definitions are in
docs/explanation/quality.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import Progress

from benchmarks.arguments import count
from benchmarks.quality import yardstick
from benchmarks.quality.measure import FULL, Measured, Traffic, check_policies, measure
from benchmarks.quality.report import print_rows, print_verdicts
from benchmarks.quality.scores import RESAMPLES, Row
from benchmarks.quality.served import ANSWER_TOKENS, Cell
from benchmarks.quality.traffic import ALL_TASKS, BURST, PROMPT_TASKS, TEXT_TASKS, Count
from benchmarks.quality.without import PARTS
from benchmarks.results import write_json
from emoe_jax.engine_config import ExpertFormat
from emoe_jax.errors import EmoeError, one_line
from emoe_jax.policies import POLICIES
from emoe_jax.requests.contract import CONTRACTS
from serve.options import DEMO_MODEL
from serve.start import keep_compilations
from train.progress import progress_bar
from train.prompts import TEXT_TOKENS
from train.sensitivity.embedding import Embed, embedding_model

DEFAULT_POLICIES = ("emoe", "emoe-paper", "static-global", "random")
DEFAULT_SHARES = (0.8, 0.6, 0.4, 0.2)


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        return run(given, sys.argv[1:] if argv is None else argv, console)
    except (EmoeError, ImportError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", default=str(DEMO_MODEL), help="checkpoint directory or hub id (default: the bundled demo model)")
    add(
        "--policies",
        nargs="+",
        choices=sorted(POLICIES),
        default=list(DEFAULT_POLICIES),
        metavar="NAME",
        help=f"of {', '.join(sorted(POLICIES))} (default {' '.join(DEFAULT_POLICIES)})",
    )
    shares = " ".join(f"{share:g}" for share in DEFAULT_SHARES)
    add(
        "--shares",
        type=share,
        nargs="+",
        default=list(DEFAULT_SHARES),
        metavar="SHARE",
        help=f"of experts resident, above 0 and at most 1 (default {shares})",
    )
    add("--contracts", nargs="+", choices=CONTRACTS, default=["resident"], help="routing contracts (default resident)")
    add(
        "--tasks",
        nargs="+",
        choices=ALL_TASKS,
        default=list(ALL_TASKS),
        metavar="TASK",
        help=f"of {', '.join(PROMPT_TASKS)}, and the texts {', '.join(TEXT_TASKS)} (default all)",
    )
    add("--prompts", type=count, default=60, metavar="N", help="of each task (default 60)")
    add("--stretches", type=count, default=16, metavar="N", help="of each kind of text (default 16)")
    add("--concurrency", type=count, default=4, metavar="N", help="sequences computed together (default 4)")
    add("--seed", type=int, default=0, help="of prompts, their order, random experts and intervals (default 0)")
    add("--random-draws", type=count, default=3, metavar="N", help="sets of random experts to average (default 3)")
    add(
        "--without",
        nargs="+",
        choices=PARTS,
        default=[],
        metavar="PART",
        help=f"also emoe in an engine that lacks a part, of {', '.join(PARTS)}",
    )
    add(
        "--task-profile",
        type=Path,
        metavar="FILE",
        help="instead of the checkpoint's, for policies that plan by requests",
    )
    add(
        "--expert-format",
        choices=get_args(ExpertFormat),
        default="auto",
        help="how the experts of every row but the first are kept (default auto: as the first row's)",
    )
    add("--embedding-model", metavar="NAME", help="also compare answers by this model; needs sentence-transformers")
    add("--check", action="store_true", help="exit with status 1 unless the yardstick holds")
    add("--json", type=Path, metavar="FILE", help="write the numbers here, after every cell")
    given = parser.parse_args(argv)
    if not 0 <= given.seed < 2**31:
        parser.error(f"--seed is {given.seed}; it must be between 0 and {2**31 - 1}")
    for name in ("policies", "shares", "contracts", "tasks", "without"):
        setattr(given, name, list(dict.fromkeys(getattr(given, name))))
    if given.check:
        _check_is_possible(parser, given)
    return given


def share(text: str) -> float:
    """For `type=` of an argument: above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and at most 1")
    return value


def _check_is_possible(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    wanted = {
        "--policies": (yardstick.NEEDS, given.policies),
        "--shares": ((yardstick.SHARE,), given.shares),
        "--contracts": (("resident",), given.contracts),
        "--tasks": (("facts",), given.tasks),
    }
    for option, (needed, chosen) in wanted.items():
        if missing := [f"{value}" for value in needed if value not in chosen]:
            parser.error(f"--check needs {' '.join(missing)} among {option}")
    for group, what in ((PROMPT_TASKS, "tasks"), (TEXT_TASKS, "kinds of text")):
        if sum(task in group for task in given.tasks) < 2:
            parser.error(f"--check needs at least 2 {what} among --tasks: {', '.join(group)}")


def run(given: argparse.Namespace, argv: Sequence[str], console: Console) -> int:
    check_policies(given.model, given.policies)
    embed: Embed | None = None if given.embedding_model is None else embedding_model(given.embedding_model)
    began = time.monotonic()
    traffic = Traffic.of(given.model, given.tasks, Count(given.prompts, given.stretches), given.seed)
    for reason in dict.fromkeys(traffic.missing.values()):
        kinds = ", ".join(kind for kind, why in traffic.missing.items() if why == reason)
        console.print(f"left out: {kinds}: {reason}", markup=False, style="dim")
    cells = [
        Cell(policy, contract, share)
        for policy in given.policies
        for contract in given.contracts
        for share in given.shares
    ]
    cells += [
        Cell("emoe", contract, share, without=part)
        for part in given.without
        for contract in given.contracts
        for share in given.shares
    ]
    options = (("expert_format", given.expert_format),)
    cells = [dataclasses.replace(cell, options=options) for cell in cells]
    rows: list[Row] = []
    results = described(given, argv, traffic)
    for done in _measured(given, cells, traffic, embed, console):
        rows += done.rows
        cell = done.rows[0].cell
        results["seconds"][f"{cell.name} {cell.contract} {cell.share:g}"] = round(done.seconds, 1)
        results["rows"] = [row.as_json() for row in rows]
        results["yardstick"] = [verdict.as_json() for verdict in yardstick.verdicts(rows)]
        write_json(results, given.json)
    print_rows(rows, console)
    found = yardstick.verdicts(rows)
    print_verdicts(found, console)
    console.print(f"{time.monotonic() - began:.0f} s in all", style="dim")
    holds = all(verdict.holds for verdict in found if verdict.required)
    return 1 if given.check and not holds else 0


def described(given: argparse.Namespace, argv: Sequence[str], traffic: Traffic) -> dict[str, Any]:
    """What the JSON says of the run beside its rows."""
    return {
        "model": given.model,
        "seed": given.seed,
        "command": shlex.join(["python", "-m", "benchmarks.quality", *argv]),
        "counts": {task: len(items) for task, items in traffic.items.items()},
        "calibration_counts": {task: len(items) for task, items in traffic.calibration.items()},
        "left_out": traffic.missing,
        "concurrency": given.concurrency,
        "random_draws": given.random_draws,
        "expert_format": given.expert_format,
        "burst": BURST,
        "answer_tokens": ANSWER_TOKENS,
        "text_tokens": TEXT_TOKENS,
        "resamples": RESAMPLES,
        "embedding_model": given.embedding_model,
        "seconds": {},
        "rows": [],
    }


def _measured(
    given: argparse.Namespace, cells: Sequence[Cell], traffic: Traffic, embed: Embed | None, console: Console
) -> Iterator[Measured]:
    """Every cell's rows while a bar shows how far it is; where no terminal is, a line says that a cell is done."""
    with progress_bar(console, "requests") as progress:

        def start(title: str, requests: int) -> Callable[[], None]:
            return _advance(progress, title, requests)

        options = (given.concurrency, given.seed, given.random_draws)
        for done in measure(given.model, cells, traffic, *options, start, embed, given.task_profile):
            if not console.is_terminal:
                cell = done.rows[0].cell
                name = "all experts resident" if cell == FULL else f"{cell.name}, {cell.share:.0%}, {cell.contract}"
                console.print(f"{name}: {done.seconds:.0f} s", style="dim", highlight=False)
            yield done


def _advance(progress: Progress, title: str, requests: int) -> Callable[[], None]:
    """The bar goes on with another task; the ones before are finished and go."""
    for task in progress.tasks:
        progress.remove_task(task.id)
    bar = progress.add_task(title, total=requests)
    return lambda: progress.advance(bar)


if __name__ == "__main__":
    keep_compilations()  # cells of the same slots run the same executables
    sys.exit(main())
