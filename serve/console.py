"""What a person at the terminal sees: progress while loading, then a table of what is being served."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from emoe_jax.amounts import format_bytes
from emoe_jax.engine_config import StepSize
from serve.parsing.forms import PLAIN, AnswerForm

ProgressCallback = Callable[[str, int, int], None]

MEMORY = {
    "weights": "weights without experts",
    "slab": "slab of resident experts",
    "kv_cache": "KV cache",
    "workspace": "workspace",
    "host": "host RAM for experts off the device",
}
"""What the engine calls each amount, and what it is. Nothing in host RAM is the default and not worth a line."""


@contextlib.contextmanager
def loading_progress(console: Console) -> Iterator[ProgressCallback]:
    """Yields `report(stage, done, total)`: a bar for each stage, or plain lines where there is no terminal."""
    if not console.is_terminal:
        yield _PlainLines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        lines = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in lines:
                lines[stage] = progress.add_task(stage)
            progress.update(lines[stage], completed=done, total=total)

        yield report


SILENT_SECONDS = 10.0
"""How long a stage may say nothing where there is no terminal, if there is progress."""


class _PlainLines:
    """A line when a stage begins and at every quarter of it; in between, one every `SILENT_SECONDS`."""

    def __init__(self, console: Console):
        self._console = console
        self._began = self._printed = time.monotonic()
        self._quarters: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        quarter, now = 4 * done // max(1, total), time.monotonic()
        if quarter > self._quarters.get(stage, -1) or now - self._printed >= SILENT_SECONDS:
            self._quarters[stage], self._printed = quarter, now
            line = f"loading: {stage} {done / max(1, total):.0%} ({now - self._began:.1f} s)"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def start_up_table(
    *,
    model: str,
    family: str,
    routing: str,
    device: str,
    memory: Mapping[str, int],
    resident: Sequence[int],
    num_experts: int,
    expert_format: str,
    dtype: str,
    has_tokenizer: bool,
    has_chat_template: bool,
    tasks: Sequence[str] | None,
    url: str,
    step: StepSize | None = None,
    sampling: Mapping[str, object] | None = None,
    pool_share: float | None = None,
    form: AnswerForm = PLAIN,
    shows_tools: bool = True,
    predictor: str | None = None,
    kernels: Path | Literal["default"] | None = None,
) -> Table:
    """`memory` in bytes by purpose; `resident` experts on the device, one number per MoE layer. Experts are kept in
    `expert_format`, and all else is in `dtype`. `pool_share` is the part of a GPU's memory that JAX takes for itself,
    where it does. `shows_tools` says whether the chat template tells the model of tools. `kernels` is where the tile
    sizes of the experts' kernels are from, where there are some."""
    table = Table(show_header=False, title="eMoE-JAX", title_justify="left")
    table.add_row("model", escape(f"{model} ({family})"))
    if not has_tokenizer:
        table.add_row("tokenizer", "none in the checkpoint: takes and returns token ids only, no chat")
    elif not has_chat_template:
        table.add_row("chat template", "none, or several without a default: /v1/completions only, no chat")
    if form != PLAIN:
        table.add_row("answers", f"thoughts are told by: {form.reasoning}; calls of tools by: {form.calls}")
    if has_chat_template and not shows_tools:
        table.add_row("tools", "the chat template does not show them: tools are refused, but for forced calls")
    planned = format_bytes(memory["device"])
    table.add_row("device", escape(f"CPU, {planned} of host RAM" if device == "cpu" else f"{device}, {planned}"))
    if pool_share is not None:
        table.add_row("memory: JAX's pool", f"{pool_share:.0%} of the card (XLA_CLIENT_MEM_FRACTION)")
    for purpose, name in MEMORY.items():
        if purpose == "host" and not memory[purpose]:
            continue
        table.add_row(f"memory: {name}", format_bytes(memory[purpose]))
    low, high = min(resident), max(resident)
    per_layer = str(low) if low == high else f"{low} to {high}"
    share = sum(resident) / (num_experts * len(resident))
    table.add_row("experts resident", f"{per_layer} of {num_experts} in each of {len(resident)} layers ({share:.0%})")
    all_else = "" if expert_format == dtype else f", all else in {dtype}"
    table.add_row("experts kept in", f"{expert_format}{all_else}")
    table.add_row("routing", routing)
    if step is not None:
        table.add_row("a step computes", f"up to {step.sequences} sequences and {step.tokens} tokens")
    if tasks is not None:
        table.add_row("tasks", escape(", ".join(tasks)))
    if kernels == "default":
        table.add_row("MoE kernels", "default tile sizes; `emoe bench kernels` chooses those that are fastest here")
    elif kernels is not None:
        table.add_row("MoE kernels", escape(f"tile sizes measured on this device: {kernels}"))
    table.add_row(
        "predictor", "none, so residency follows what routers choose" if predictor is None else escape(predictor)
    )
    if sampling:
        values = ", ".join(f"{name} {value}" for name, value in sampling.items())
        table.add_row("sampling defaults", f"{values} (generation_config.json)")
    table.add_row("address", url)
    return table
