"""What a person at the terminal sees: a progress bar while loading, then a table of what is being served."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from emoe_jax.experts.budget import format_bytes

ProgressCallback = Callable[[str, int, int], None]


@contextlib.contextmanager
def loading_bar(console: Console) -> Iterator[ProgressCallback]:
    """Yields `report(stage, done, total)`; each stage gets its own line."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        lines = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in lines:
                lines[stage] = progress.add_task(stage)
            progress.update(lines[stage], completed=done, total=total)

        yield report


def start_up_table(
    *,
    model: str,
    family: str,
    routing: str,
    memory: Mapping[str, int],
    resident: Sequence[int],
    num_experts: int,
    url: str,
) -> Table:
    """`memory` in bytes by purpose; `resident` experts on the device, one number per MoE layer."""
    table = Table(show_header=False, title="eMoE-JAX", title_justify="left")
    table.add_row("model", escape(f"{model} ({family})"))
    for purpose, size in memory.items():
        table.add_row(f"memory: {purpose.replace('_', ' ')}", format_bytes(size))
    low, high = min(resident), max(resident)
    per_layer = str(low) if low == high else f"{low} to {high}"
    share = sum(resident) / (num_experts * len(resident))
    table.add_row("experts resident", f"{per_layer} of {num_experts} in each of {len(resident)} layers ({share:.0%})")
    table.add_row("routing", routing)
    table.add_row("address", url)
    return table
