"""`python -m benchmarks.paper`: each measured claim of the eMoE paper, measured here, and whether the two agree.

Results are kept and found again while the model, the traces and the code that they depend on stay as they are. So a run
that was killed goes on where it ended. --quick measures little of everything: it shows that each row can be made.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.arguments import positive
from benchmarks.paper import report
from benchmarks.paper.bench import CONCURRENCY, Bench
from benchmarks.paper.cache import Cache
from benchmarks.paper.claim import Claim, Row
from benchmarks.paper.claims import CLAIMS
from benchmarks.paper.sizes import FULL, QUICK
from benchmarks.results import write_json
from emoe_jax.demo import demo_model
from emoe_jax.errors import ConfigError, EmoeError, one_line, require
from emoe_jax.models import open_checkpoint
from serve.start import keep_compilations


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 whether or not the claims hold; 2 where something could not be measured."""
    argv = sys.argv[1:] if argv is None else argv
    given = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if given.plots:
            require("matplotlib")
        require("optax")
        rows, described = run(given, argv, console)
        report.print_rows(rows, console)
        if given.json is not None:
            write_json(report.as_json(rows, described), given.json)
        if given.out is not None:
            report.write(rows, described, given.out, given.plots, [*CLAIMS])
    except (EmoeError, ImportError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", metavar="ROW", help=f"of {', '.join(CLAIMS)}; fig1 stands for all that begin so")
    add("--quick", action="store_true", help="little of everything, to see that each row can be made")
    add("--model", default=str(demo_model()), help="checkpoint that answers (the bundled demo model)")
    add(
        "--trace",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="also a routing trace (.npz) of another model, for the rows that replay; may be given again",
    )
    add(
        "--link-gbps",
        type=positive,
        default=0.25,
        help="GB/s of the modelled link from host to device (default 0.25: an expert of the demo then takes about as "
        "long as one of its layers computes for one token)",
    )
    add("--seed", type=int, default=0, help="of prompts, arrivals and weights")
    add(
        "--out",
        type=Path,
        metavar="OUT",
        help="write OUT.md, and rows and plots in the folder OUT, whose other rows stay",
    )
    add("--json", type=Path, metavar="FILE", help="write the rows here")
    add("--plots", action=argparse.BooleanOptionalAction, default=True, help="draw each row's figure into OUT")
    add(
        "--cache", type=Path, default=_usual_cache(), metavar="DIR", help="where results are kept (default %(default)s)"
    )
    given = parser.parse_args(argv)
    if not 0 <= given.seed < 2**31:
        parser.error(f"--seed is {given.seed}; it must be between 0 and {2**31 - 1}")
    given.claims = _chosen(parser, given.only)
    given.traces = dict(_trace(parser, text) for text in given.trace)
    return given


def _usual_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emoe-jax" / "paper"


def _chosen(parser: argparse.ArgumentParser, only: Sequence[str] | None) -> list[Claim]:
    if only is None:
        return [*CLAIMS.values()]
    chosen = []
    for name in only:
        found = [claim for id, claim in CLAIMS.items() if id == name or id.startswith(f"{name}-")]
        if not found:
            parser.error(f"--only names {name}; the rows are {', '.join(CLAIMS)}")
        chosen += found
    return [*dict.fromkeys(chosen)]


def _trace(parser: argparse.ArgumentParser, text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if not name or not file:
        parser.error(
            f"--trace is {text!r}; it must be a model's name, an equals sign, and a file: gpt-oss-20b=trace.npz"
        )
    if name == "demo":
        parser.error("--trace names demo, which stands for the trace that this command records")
    return name, Path(file)


def run(given: argparse.Namespace, argv: Sequence[str], console: Console) -> tuple[list[Row], dict[str, Any]]:
    """All chosen rows, and what the run was."""
    for path in given.traces.values():
        if not path.exists():
            raise ConfigError(f"{path} does not exist")
    keep_compilations()
    sizes = QUICK if given.quick else FULL

    def tell(text: str) -> None:
        console.print(text, style="dim", markup=False, highlight=False)

    directory = open_checkpoint(given.model).directory
    cache = Cache(given.cache, [directory, *given.traces.values()])
    bench = Bench(given.model, given.traces, sizes, cache, tell, given.seed, given.link_gbps)
    rows = []
    for number, claim in enumerate(given.claims, start=1):
        tell(f"{claim.id} ({number} of {len(given.claims)}): {claim.claim}")
        bench.seconds = 0.0
        numbers = claim.measure(bench)
        rows.append(Row(claim, numbers, claim.conclude(numbers), bench.seconds))
    described = {
        "command": shlex.join(["python", "-m", "benchmarks.paper", *argv]),
        "quick": given.quick,
        "seed": given.seed,
        "link_gbps": given.link_gbps,
        "concurrency": CONCURRENCY,
        **sizes._asdict(),
    }
    return rows, described


if __name__ == "__main__":
    raise SystemExit(main())
