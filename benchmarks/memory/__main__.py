"""`python -m benchmarks.memory --model DIR_OR_CONFIG --device-memory 96GB`: memory against prompt length and batch with
all and with part of the experts resident, the longest prompt and the largest batch that fit, and how many times those
of all experts they are (the eMoE paper's figures 17 and 18).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.memory import report
from benchmarks.memory.geometries import GEOMETRIES
from benchmarks.memory.needs import Workload, measure
from emoe_jax.amounts import parse_bytes
from emoe_jax.config import ModelConfig
from emoe_jax.errors import EmoeError, one_line, require
from emoe_jax.experts.record_format import QUANTISED
from emoe_jax.memory.plan import DTYPES, resolve_dtype
from emoe_jax.models import config_from_hf
from emoe_jax.planning.catalogue import read_config


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if given.plots is not None:
            require("matplotlib")
        if given.geometry is not None:
            name, config = given.geometry, config_from_hf(GEOMETRIES[given.geometry])
        else:
            name, config = given.model.resolve().name, read_config(given.model)
        numbers = run(name, config, given)
        report.print_numbers(numbers, console)
        if given.json is not None:
            given.json.write_text(json.dumps(numbers, indent=1) + "\n")
        if given.plots is not None:
            report.plot(numbers, given.plots / "memory.png")
    except (EmoeError, ImportError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def run(name: str, config: ModelConfig, given: argparse.Namespace) -> dict[str, Any]:
    """All numbers, with what they are of."""
    device_bytes = parse_bytes("--device-memory", given.device_memory)
    load = Workload(given.prompt_length, given.batch, given.output_tokens)
    dtype = resolve_dtype(given.dtype, config, "gpu")
    kept = given.expert_format if given.expert_format != "auto" else config.expert_format or dtype
    lengths, batches = given.prompt_lengths, given.batches
    return {
        "model": {
            "name": name,
            "dtype": dtype,
            "expert_format": kept,
            "moe_layers": len(config.moe_layers),
            "experts": config.num_experts,
            "top_k": config.top_k,
            "max_position": config.max_position,
        },
        "device_bytes": device_bytes,
        "load": load._asdict(),
        "resident": measure(config, dtype, device_bytes, given.shares, load, lengths, batches, kept),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    add = parser.add_argument
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--model", type=Path, metavar="PATH", help="checkpoint directory, or a config.json")
    of.add_argument("--geometry", choices=sorted(GEOMETRIES), help="a known model's shape, without a checkpoint")
    add("--device-memory", default="160GB", metavar="SIZE", help="of all devices together (default 160GB, the paper's)")
    add("--dtype", choices=DTYPES, default="auto", help="auto is the checkpoint's, as on a GPU")
    formats = ("auto", *QUANTISED)
    add("--expert-format", choices=formats, default="auto", help="of experts; auto is the checkpoint's, else dtype")
    add("--shares", type=float, nargs="+", default=[1.0, 0.6, 0.4, 0.2], metavar="SHARE", help="of resident experts")
    add("--prompt-length", type=int, default=512, metavar="N", help="tokens, where batches vary (default 512)")
    add("--batch", type=int, default=4, metavar="N", help="sequences, where prompt lengths vary (default 4)")
    add("--output-tokens", type=int, default=0, metavar="N", help="per sequence, beside its prompt (default 0)")
    lengths, batches = [2**n for n in range(7, 17)], [2**n for n in range(9)]
    add("--prompt-lengths", type=int, nargs="+", default=lengths, metavar="N", help="of the first table")
    add("--batches", type=int, nargs="+", default=batches, metavar="N", help="of the second table")
    add("--json", type=Path, metavar="FILE", help="write the numbers here")
    add("--plots", type=Path, metavar="DIR", help="write curves as PNG here")
    given = parser.parse_args(argv)
    if not all(0 < share <= 1 for share in given.shares):
        parser.error("shares of resident experts lie between 0 and 1")
    for option in ("prompt_length", "batch", "prompt_lengths", "batches"):
        value = getattr(given, option)
        smallest = min(value) if isinstance(value, list) else value
        if smallest < 1:
            parser.error(f"--{option.replace('_', '-')} is {smallest}; it must be at least 1")
    if given.output_tokens < 0:
        parser.error(f"--output-tokens is {given.output_tokens}; it must be at least 0")
    return given


if __name__ == "__main__":
    raise SystemExit(main())
