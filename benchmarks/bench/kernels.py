"""`emoe bench kernels MODEL`: choose the tile sizes of the MoE op's kernels on this device, for later starts."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emoe_jax.amounts import format_number
from emoe_jax.demo import demo_model
from emoe_jax.engine_config import Dtype, ExpertFormat
from emoe_jax.option_fields import Options, option
from serve.exits import NO_DEVICE, OK, status_of
from serve.flags import Parser, flag_names, parser_of, read_values

COMMAND = "python -m benchmarks.bench.kernels"
INTERPRETED = "interpreted"
"""The kind of device of a dry run, which no engine has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsOptions(Options):
    """What `emoe bench kernels` is told, beside the model."""

    dtype: Dtype = option("auto", "dtype of what is computed, as of the server")
    expert_format: ExpertFormat = option("auto", "how experts are kept, as of the server")
    dry: bool = option(False, "whether to go the same way in moments, with interpreted kernels and small experts")
    json: bool = option(False, "whether to print JSON instead of a table")


def parser(command: str = COMMAND) -> Parser:
    """The command line."""
    description = (
        "Measure the kernels of experts with several tile sizes, by rows per expert, for the shapes of a model. The "
        "fastest are kept in a file that the engine reads at its start. The exit status is 3 where there is no GPU."
    )
    made = parser_of(KernelsOptions, command, description, {KernelsOptions: "kernels"})
    made.add_argument(
        "model",
        nargs="?",
        default=str(demo_model()),
        metavar="MODEL",
        help="directory, config.json, known model or hub id, of which only the config.json is read (default: the demo)",
    )
    return made


def main(arguments: Sequence[str] | None = None, command: str = COMMAND) -> int:
    """Measure, keep the choice, and print it; the exit status."""
    given = read_values(parser(command), KernelsOptions, sys.argv[1:] if arguments is None else arguments)
    model = given.pop("model")
    return status_of(lambda: _run(model, KernelsOptions(**given)), lambda text: flag_names(text, KernelsOptions))


def _run(model: str, options: KernelsOptions) -> int:
    from emoe_jax.memory.device_settings import prepare_devices  # these start JAX
    from emoe_jax.memory.plan import machine_memory
    from emoe_jax.planning.catalogue import find_model
    from emoe_jax.platforms import default_platform

    find_model(model)  # a mistake is named on a machine without a GPU, too
    prepare_devices(machine_memory())
    if default_platform() != "cuda" and not options.dry:
        print(
            "there is nothing to choose: only an NVIDIA GPU has kernels with tile sizes, and JAX sees none here; --dry "
            "goes the same way without one",
            file=sys.stderr,
        )
        return NO_DEVICE
    numbers = measure(model, options, Console(stderr=True))
    if options.json:
        print(json.dumps(numbers, indent=1))
    else:
        show(numbers, Console(width=None if sys.stdout.isatty() else 160))
    return OK


def measure(model: str, options: KernelsOptions, console: Console) -> dict[str, Any]:
    """The choice, where it is kept, and what was measured of it."""
    import jax

    from benchmarks.bench.tuning import DRY, Search, small, tune
    from emoe_jax.memory.plan import resolve_dtype
    from emoe_jax.moe.kernel_choice import KernelKey, save_choice, use_choice
    from emoe_jax.planning.catalogue import find_model

    name, config = find_model(model)
    platform = "cpu" if options.dry else "gpu"
    dtype = resolve_dtype(options.dtype, config, platform)
    expert_format = options.expert_format
    if expert_format == "auto":
        expert_format = config.expert_format or dtype
    config = small(config) if options.dry else config
    device = INTERPRETED if options.dry else jax.devices()[0].device_kind
    table, rows = tune(
        config,
        dtype,
        expert_format,
        DRY if options.dry else Search(),
        lambda line: console.print(line, style="dim", markup=False, highlight=False),
    )
    key = KernelKey.of(config, dtype, expert_format)
    save_choice(key, device, table, rows)
    return {
        "model": name,
        "device": device,
        "dtype": dtype,
        "expert_format": expert_format,
        "file": str(use_choice(key, device)),  # read back as an engine reads it
        "choices": rows,
    }


def show(numbers: dict[str, Any], console: Console) -> None:
    """A row for each number of rows per expert."""
    dtypes = f"rows of {numbers['dtype']}, experts in {numbers['expert_format']}"
    interpreted = numbers["device"] == INTERPRETED
    model = "small experts" if interpreted else numbers["model"]
    title = f"{model} on {numbers['device']}, {dtypes}"
    sizes = ("rows", "tile_in", "tile_out", "depth", "warps", "stages")
    table = Table("rows per expert", *(name.replace("_", " ") for name in sizes), "ms", "default, ms", "failed")
    table.title, table.title_justify = escape(title), "left"
    for row in numbers["choices"]:
        limit = "more" if row["rows_per_expert"] is None else f"up to {row['rows_per_expert']:,}"
        default = "-" if row["default_seconds"] is None else format_number(1e3 * row["default_seconds"])
        chosen = (str(row["config"][name]) for name in sizes)
        table.add_row(limit, *chosen, format_number(1e3 * row["seconds"]), default, str(sum(row["failed"].values())))
    console.print(table)
    use = "no engine reads it" if interpreted else "engines read it at their start"
    console.print(f"kept in {numbers['file']}; {use}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
