"""`python -m benchmarks.transfers`: time, memory and transfers of six ways of serving, by batch.

All experts resident; eMoE, with predictions when they pay (`emoe`) and for every prompt (`emoe-e`); experts loaded on
demand; the next layer's experts loaded while a layer computes (`pre-gated`); and experts loaded ahead by the
activations of recorded requests (`infinity`). Figures 1, 2 and 16 of the paper.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.arguments import count, positive
from benchmarks.quality.__main__ import share
from benchmarks.results import write_json
from benchmarks.transfers.measure import Settings, measure
from benchmarks.transfers.modes import MODES
from benchmarks.transfers.report import print_transfers
from emoe_jax.errors import EmoeError, one_line
from serve.options import DEMO_MODEL
from serve.start import keep_compilations

USUAL = Settings(str(DEMO_MODEL))
QUICK = USUAL._replace(batches=(1, 2), repeats=1, steps=8)


def main(argv: Sequence[str] | None = None) -> int:
    settings, path = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    began = time.monotonic()

    def tell(what: str) -> None:
        console.print(f"{time.monotonic() - began:5.0f} s  {what}", style="dim", markup=False, highlight=False)

    def save(results: dict[str, Any]) -> None:
        write_json(results | {"load_average": os.getloadavg()[0], "cores": os.cpu_count()}, path)

    try:
        print_transfers(measure(settings, tell, save), console)
    except (EmoeError, ImportError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    tell(f"done; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    return 0


def parse(argv: Sequence[str] | None) -> tuple[Settings, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfers", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default=USUAL.model, help="checkpoint directory or hub id (default: the bundled demo model)")
    add(
        "--batches", type=count, nargs="+", metavar="N", help=f"requests side by side (default {_words(USUAL.batches)})"
    )
    add("--modes", nargs="+", choices=MODES, metavar="NAME", help=f"of {', '.join(MODES)} (default all of them)")
    add("--share", type=share, default=USUAL.share, help="of experts resident, but in mode all (default %(default)s)")
    add(
        "--link-gbps",
        type=positive,
        metavar="X",
        help="also over a modelled link of so many gigabytes (1e9 bytes) per second, beside the machine's own",
    )
    add("--repeats", type=count, metavar="N", help=f"runs of each mode and batch, in turns (default {USUAL.repeats})")
    add("--steps", type=count, metavar="N", help=f"tokens of an answer (default {USUAL.steps})")
    add("--seed", type=int, default=USUAL.seed, help="of the prompts (default %(default)s)")
    add(
        "--quick",
        action="store_true",
        help=f"batches {_words(QUICK.batches)}, {QUICK.repeats} run, {QUICK.steps} tokens, where not given otherwise",
    )
    add("--json", type=Path, metavar="FILE", help="write the numbers here, after every repeat")
    given = parser.parse_args(argv)
    if given.seed < 0:
        parser.error(f"--seed is {given.seed}; it must be at least 0")
    settings = QUICK if given.quick else USUAL
    settings = settings._replace(model=given.model, share=given.share, link_gbps=given.link_gbps, seed=given.seed)
    for name in ("batches", "modes"):
        if getattr(given, name) is not None:
            settings = settings._replace(**{name: tuple(dict.fromkeys(getattr(given, name)))})
    for name in ("repeats", "steps"):
        if getattr(given, name) is not None:
            settings = settings._replace(**{name: getattr(given, name)})
    return settings, given.json


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


if __name__ == "__main__":
    keep_compilations()  # engines of the same slots run the same executables
    sys.exit(main())
