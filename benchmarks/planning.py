"""The planner's prediction against this machine: `python -m benchmarks.planning --json FILE`, or `emoe plan --check`.

What the parts of a step cost is measured first, with short random models (`benchmarks.calibration`). With these costs
the planner predicts decode steps and the first token of a prompt of two models that were not run, from their
`config.json`: the demo, and the Mixtral of `benchmarks.peers` with 430 M float32 parameters. Then engines do these, all
experts resident.

JSON: `{"costs": {part: seconds}, "rows": [{"model", "what", "predicted_ms", "measured_ms", "ratio", "parts_ms":
{part: ms}}, ...]}`. The ratio is that of the predicted time to the measured one. The parts but `host` are those of the
device.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.arguments import count
from benchmarks.calibration import calibrated, engine_of, measured, predicted, works_of
from benchmarks.decoding import write_random_checkpoint
from benchmarks.peers import MODEL
from benchmarks.results import write_json
from emoe_jax import EmoeError
from emoe_jax.amounts import format_number
from emoe_jax.checkpoint.files import CONFIG, read_json
from emoe_jax.demo import demo_model
from emoe_jax.errors import one_line
from emoe_jax.memory.plan import usable_memory
from emoe_jax.planning.rates import this_machine
from emoe_jax.planning.roofline import Work
from emoe_jax.planning.targets import Target

REPETITIONS = 7

LABELS = {
    "memory_bytes": ("reading", "GB/s"),
    "packed_bytes": ("packing", "GB/s"),
    "repeated_bytes": ("reading again", "GB/s"),
    "operations": ("products", "GFLOP/s"),
    "choices": ("choices", "us"),
    "rows": ("rows", "us"),
    "layers": ("layers", "us"),
    "host": ("host", "us"),
}
"""What each part is called in the table, and the unit of what it costs."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument(
        "--repetitions", type=count, default=REPETITIONS, metavar="N", help="of each measurement (default %(default)s)"
    )
    options = parser.parse_args(argv)
    try:
        numbers = check(options.repetitions)
        show(numbers, Console())
        write_json(numbers, options.json)
    except (EmoeError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def check(repetitions: int) -> dict[str, Any]:
    """The machine's costs, and a row for each time that is predicted and measured."""
    demo = read_json(demo_model() / CONFIG)
    target = calibrated(this_machine(usable_memory()), (demo, MODEL), repetitions)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        random = Path(folder) / "random"
        write_random_checkpoint(random, MODEL)
        for name, path in (("demo", demo_model()), ("430 M", random)):
            with engine_of(path) as engine:
                rows += compared(name, works_of(engine.config), target, measured(engine, repetitions))
    return {"costs": target.costs._asdict() | {"memory_bytes": 1 / target.bandwidth}, "rows": rows}


def compared(
    model: str, works: dict[str, Work], target: Target, measurements: dict[str, float]
) -> list[dict[str, Any]]:
    """Both times of each prediction, their ratio, and the parts of the predicted one."""
    rows = []
    for what, seconds in predicted(works, target).items():
        work = works[what]
        parts = {"memory_bytes": work.memory_bytes / target.bandwidth, "host": target.costs.host, **work.costs(target)}
        rows.append(
            {
                "model": model,
                "what": what,
                "predicted_ms": 1e3 * seconds,
                "measured_ms": 1e3 * measurements[what],
                "ratio": seconds / measurements[what],
                "parts_ms": {part: 1e3 * parts[part] for part in LABELS},
            }
        )
    return rows


def show(numbers: dict[str, Any], console: Console) -> None:
    """Both times and their ratio, then what each part takes of the predicted one, and what it costs."""
    rows = numbers["rows"]
    table = Table()
    for column in ("model", "what", "predicted", "measured", "ratio"):
        table.add_column(column, justify="left" if column in ("model", "what") else "right")
    for row in rows:
        times = (f"{format_number(row[f'{kind}_ms'], 3)} ms" for kind in ("predicted", "measured"))
        table.add_row(row["model"], row["what"], *times, f"{row['ratio']:.2f}")
    console.print(table)
    parts = Table(title="parts of the predicted times, ms", title_justify="left")
    parts.add_column("part", no_wrap=True)
    for row in rows:
        parts.add_column(f"{row['model']}: {row['what'].removeprefix('decode, ')}", justify="right")
    parts.add_column("cost", justify="right", no_wrap=True)
    for part, (label, _) in LABELS.items():
        parts.add_row(label, *(f"{row['parts_ms'][part]:.2g}" for row in rows), _cost(part, numbers["costs"][part]))
    console.print(parts)


def _cost(part: str, seconds: float) -> str:
    """For people: as a rate of bytes or operations, else as it is."""
    unit = LABELS[part][1]
    if unit == "us":
        return f"{1e6 * seconds:.3g} {unit}"
    return f"{1e-9 / seconds:.3g} {unit}" if seconds else "none"


if __name__ == "__main__":
    raise SystemExit(main())
