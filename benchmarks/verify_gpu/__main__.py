"""Checks and measures the engine on a GPU: `python -m benchmarks.verify_gpu --json FILE`.

1. Versions, and the bandwidth of memory and link.
2. Every backend of attention and of the MoE op against its reference, and its time against the bytes it must read.
3. The step functions against the CPU, logit for logit.
4. Decoding and prefill of random models of real shapes at 100, 60, 40 and 20 % of the experts, with loads and without.

It needs no network and takes at most 8 minutes: parts that no time is left for are named. Without a GPU it exits with
3, unless `--dry` asks for tiny shapes and interpreted kernels: that is how it is tested. `--floors` prints what a
decode step must read on some cards, and needs no GPU either.

JSON: `{"versions", "bandwidths", "kernels": [...], "steps": [...], "models": [...], "skipped": [...], "passes"}`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.results import write_json
from benchmarks.verify_gpu import floors, kernels, machine, models, steps
from emoe_jax.memory.device_settings import prepare_devices
from emoe_jax.memory.plan import machine_memory
from emoe_jax.planning.rates import product_rate

NO_GPU = 3
"""The exit status where there is no GPU to verify."""
FAILED = 1
LIMIT_SECONDS = 8 * 60
_FOR_A_MODEL = 60
"""Seconds that must be left to begin with another model."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify_gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, after each part")
    parser.add_argument("--dry", action="store_true", help="tiny shapes and interpreted kernels, on any device")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="trace the models' steps: loads beside steps are seen"
    )
    parser.add_argument("--floors", action="store_true", help="print what decode steps must read, and end")
    options = parser.parse_args(argv)
    console = Console(width=160)
    if options.floors:
        show(console, "Bytes and floors of a bfloat16 decode step, contexts of 2,048 tokens", floors.table())
        return 0
    prepare_devices(machine_memory())
    if not options.dry and jax.default_backend() != "gpu":
        print(
            f"error: JAX sees no GPU here, only {jax.devices()[0].device_kind}; install a CUDA build of JAX "
            "(pip install '.[cuda12]'), or try --dry",
            file=sys.stderr,
        )
        return NO_GPU
    with jax.profiler.trace(str(options.profile)) if options.profile else contextlib.nullcontext():
        results = verify(options.dry, options.json, console)
    console.print("everything passes" if results["passes"] else "SOMETHING FAILS: see the rows above")
    return 0 if results["passes"] else FAILED


def verify(dry: bool, path: Path | None, console: Console) -> dict[str, Any]:
    """All parts in turn. The numbers are written after each, so that a run that is cut off leaves what it has."""
    began = time.monotonic()
    results: dict[str, Any] = {"versions": machine.versions(), "skipped": []}
    console.print(results["versions"])
    size, repetitions = (1 << 20, 1) if dry else (1 << 30, 5)
    results["bandwidths"] = machine.bandwidths(size, repetitions)
    results["flops"] = {
        dtype: product_rate(64 if dry else 8192, dtype, repetitions) for dtype in ("float32", "bfloat16")
    }
    show(console, "GB/s", [{name: rate / 1e9 for name, rate in results["bandwidths"].items()}])
    write_json(results, path)
    bandwidth, rates = results["bandwidths"]["device_memory"], results["bandwidths"]
    link = rates.get("pinned_host_to_device", rates["host_to_device"])

    def part(name: str, title: str, rows: Callable[[], Any]) -> None:
        results[name] = []
        for row in rows():
            results[name].append(row)
            write_json(results, path)
        show(console, title, results[name])

    part("steps", "Steps against the CPU", lambda: [steps.check_steps("cuda" if not dry else None)])
    part("kernels", "Kernels against their references and floors", lambda: kernels.check_all(dry, bandwidth))

    def of_models() -> Any:
        for load in models.workloads(dry):
            stats = jax.devices()[0].memory_stats() or {}
            shares = (0.5,) if dry else models.SHARES
            for share in shares:
                if time.monotonic() - began > LIMIT_SECONDS - _FOR_A_MODEL:
                    results["skipped"].append(f"{load.name} at {share:.0%}: no time left")
                    continue
                yield from models.measure(load, stats.get("bytes_limit", 1 << 30), bandwidth, link, (share,))

    part("models", "Models", of_models)
    results["passes"] = all(row["passes"] for name in ("steps", "kernels") for row in results[name])
    results["seconds"] = time.monotonic() - began
    write_json(results, path)
    return results


def show(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table whose columns are those of all rows, dictionaries in cells spread out."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    table = Table(title=title)
    for name in columns:
        table.add_column(name.replace("_", " "), justify="left" if name in ("case", "model", "backend") else "right")
    for row in flat:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    console.print(table)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name} {inner}": each for inner, each in value.items()}
        else:
            flat[name] = value
    return flat


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
