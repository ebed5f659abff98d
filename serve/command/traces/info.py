"""`emoe traces info FILE`: what a routing trace holds, by task."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emoe_jax.option_fields import Options, option
from emoe_jax.traces import RoutingTrace
from emoe_jax.traces.coverage import coverage
from serve.exits import OK, status_of
from serve.flags import Parser, parser_of, read_values

COMMAND = "python -m serve.command.traces.info"
SHARES = (0.25, 0.5, 0.75)
"""Of the experts of a layer, for the coverage of a fixed set."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfoOptions(Options):
    """What `emoe traces info` is told, beside the trace."""

    json: bool = option(False, "whether to print JSON instead of a table")


def parser(command: str = COMMAND) -> Parser:
    """The command line."""
    description = (
        "What a routing trace holds. `fixed set` is the share of the routers' choices that the most frequent experts "
        "cover, as many of each layer as the share says."
    )
    made = parser_of(InfoOptions, command, description, {InfoOptions: "info"})
    made.add_argument("trace", metavar="FILE", help="routing trace (.npz)")
    return made


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Print what the trace holds; the exit status."""
    given = read_values(parser(command), InfoOptions, sys.argv[1:] if arguments is None else arguments)
    path = given.pop("trace")
    return status_of(lambda: _run(path, InfoOptions(**given)))


def _run(path: str, options: InfoOptions) -> int:
    numbers = describe(RoutingTrace.load(path))
    if options.json:
        print(json.dumps(numbers, indent=1))
    else:
        show(numbers, Console())
    return OK


def describe(trace: RoutingTrace) -> dict[str, Any]:
    """The trace's shape, what it holds beside choices, and by task its prompts, tokens and coverages."""
    counts, tasks = trace.counts(), np.asarray(trace.tasks, object)
    rows = np.bincount(trace.sample, minlength=trace.num_prompts)
    return {
        "trace": trace.source,
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "ranks": trace.ranks,
        "prompts": trace.num_prompts,
        "tokens": trace.num_tokens,
        "holds": [
            name for name in ("prompt_length", "prompt_embedding", "prompt_tokens") if getattr(trace, name) is not None
        ],
        "fixed_set": _fixed_sets(counts.sum(0), trace),
        "tasks": {
            task: {
                "prompts": int((tasks == task).sum()),
                "tokens": int(rows[tasks == task].sum()),
                "fixed_set": _fixed_sets(counts[tasks == task].sum(0), trace),
            }
            for task in sorted(set(trace.tasks))
        },
    }


def _fixed_sets(wishes: np.ndarray, trace: RoutingTrace) -> dict[str, float | None]:
    """By share of the experts, rounded down to whole slots; None where no expert was chosen."""
    slots = {share: max(1, int(share * trace.num_experts)) for share in SHARES}
    return {
        f"{share:g}": float(coverage(wishes, wishes, [count] * trace.num_layers)) if wishes.any() else None
        for share, count in slots.items()
    }


def show(numbers: dict[str, Any], console: Console) -> None:
    """A row for each task, and one for all."""
    title = (
        f"{numbers['trace']}: {numbers['layers']} MoE layers of {numbers['experts']} experts, top-{numbers['top_k']}"
    )
    table = Table(title=escape(title), title_justify="left")
    table.add_column("task")
    for name in ("prompts", "tokens", *(f"fixed set of {share:.0%}" for share in SHARES)):
        table.add_column(name, justify="right")
    for task, row in [*numbers["tasks"].items(), ("all", numbers)]:
        covered = ("-" if share is None else f"{share:.1%}" for share in row["fixed_set"].values())
        table.add_row(escape(task), f"{row['prompts']:,}", f"{row['tokens']:,}", *covered)
    console.print(table)
    held = ", ".join(name.replace("_", " ") for name in numbers["holds"]) or "nothing"
    console.print(f"beside the routers' choices it holds: {held}", highlight=False)
    if numbers["ranks"] > numbers["top_k"]:
        console.print(f"of each token and layer it holds {numbers['ranks']} ranks", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
