"""`python -m benchmarks.residency`: residency policies replayed on a routing trace (`--trace FILE`), or live in an
engine that answers the demo tasks (`--live MODEL`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from benchmarks.residency.forecasts import learn_from
from benchmarks.residency.grid import NAMES, RESIDENCIES, measure
from benchmarks.residency.live import Save, measure_live
from benchmarks.residency.live_report import plot_live, print_live
from benchmarks.residency.report import plot_grid, print_grid
from benchmarks.residency.split import read_traces
from benchmarks.results import write_json
from emoe_jax.amounts import parse_bandwidth, parse_bytes
from emoe_jax.errors import ConfigError, EmoeError, one_line, require
from emoe_jax.policies import POLICIES
from serve.start import keep_compilations

LIVE_POLICIES = sorted(POLICIES)
_SHARES = f"of resident experts (default {' '.join(f'{share:g}' for share in RESIDENCIES)})"
_NAMES = f"of {', '.join(LIVE_POLICIES)} (default emoe)"


def main(argv: Sequence[str] | None = None) -> None:
    given = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if given.plots is not None:
            require("matplotlib")
        if given.trace is not None:
            require("optax")
        results: dict[str, Any] = {}
        if given.trace is not None:
            results |= replay_trace(given, console)
        if given.live is not None:
            results |= run_live(given, console, lambda part: write_json(results | part, given.json))
        write_json(results, given.json)
    except (EmoeError, ImportError, OSError) as error:
        _fail(one_line(error))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.residency", description=__doc__)
    add = parser.add_argument
    add("--trace", type=Path, metavar="FILE", help="routing trace to replay")
    add("--live", metavar="MODEL", help="checkpoint to answer the demo tasks with, for example checkpoints/demo")
    add(
        "--train-trace",
        type=Path,
        metavar="FILE",
        help="learn from this trace and replay all of --trace (default: learn from its first three quarters of "
        "prompts, replay the last)",
    )
    add(
        "--predictor",
        type=Path,
        metavar="DIR",
        help="trained predictor, with its forecast within an answer (default: both are "
        "learned from the training prompts, the first in closed form)",
    )
    add(
        "--predict-every",
        type=int,
        default=1,
        metavar="P",
        help="prompts that share a prediction (default 1; emoe-paper: 40)",
    )
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32], metavar="R", help="requests side by side")
    add("--policies", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    add("--expert-bytes", default="13.2MB", help="size of an expert (default 13.2MB, gpt-oss-20b in MXFP4)")
    add("--link-bandwidth", default="25GB", help="bytes per second to the device (default 25GB, PCIe 4.0 x16)")
    live = parser.add_argument_group("with --live")
    live.add_argument("--shares", type=float, nargs="+", default=[*RESIDENCIES], metavar="SHARE", help=_SHARES)
    live.add_argument(
        "--live-policies", nargs="+", choices=LIVE_POLICIES, default=["emoe"], metavar="NAME", help=_NAMES
    )
    live.add_argument("--per-task", type=int, default=60, metavar="N", help="test prompts of each task (default 60)")
    live.add_argument("--repetitions", type=int, default=5, metavar="N", help="of each timing (default 5)")
    live.add_argument("--switch-share", type=float, default=0.4, metavar="SHARE", help="residency of the topic switch")
    add("--json", type=Path, metavar="FILE", help="write the numbers here")
    add("--plots", type=Path, metavar="DIR", help="write curves as PNG files here")
    given = parser.parse_args(argv)
    if given.trace is None and given.live is None:
        parser.error("give --trace FILE, --live MODEL or both")
    if not all(0 < share <= 1 for share in (*given.shares, given.switch_share)):
        parser.error("shares of resident experts lie between 0 and 1")
    if min(given.per_task, given.repetitions) < 1:
        parser.error("--per-task and --repetitions must be at least 1")
    return given


def run_live(given: argparse.Namespace, console: Console, save: Save) -> dict[str, Any]:
    results = measure_live(
        given.live,
        given.shares,
        given.live_policies,
        given.per_task,
        given.repetitions,
        given.switch_share,
        lambda text: console.print(text, style="dim"),
        save,
    )
    print_live(results, console)
    if given.plots is not None:
        plot_live(results, given.plots / "residency_live.png")
    return results


def replay_trace(given: argparse.Namespace, console: Console) -> dict[str, Any]:
    """`replay` is one request at a time (or the first of `--concurrency`); `replay_concurrent` has all of them."""
    cost = _cost(given.expert_bytes, given.link_bandwidth)
    for option, values in (("--predict-every", [given.predict_every]), ("--concurrency", given.concurrency)):
        if min(values) < 1:
            raise ConfigError(f"{option} is {min(values)}; it must be at least 1")
    read = read_traces(given.trace, given.train_trace, given.predictor)
    trained, trace, predictor, dynamics = read.trained, read.replayed, read.predictor, read.dynamics
    if read.warning:
        console.print(f"warning: {read.warning}", markup=False)
    console.print(f"{trace.describe()}: learning from {trained.num_prompts} prompts, replaying {trace.num_prompts}")
    learned = learn_from(trained, predictor, dynamics, lambda line: console.print(line, style="dim"))
    by_concurrency = {}
    for concurrency in given.concurrency:
        grid = measure(
            trace,
            learned,
            given.predict_every,
            concurrency,
            given.policies,
            cost,
            lambda policy, seconds: console.print(f"{policy}: {seconds:.1f} s", style="dim"),
        )
        by_concurrency[str(concurrency)] = grid
        title = "one request at a time" if concurrency == 1 else f"{concurrency} requests side by side"
        print_grid(grid, title, console)
        if given.plots is not None:
            plot_grid(grid, f"{trace.describe()}, {title}", given.plots / f"residency_{concurrency}.png")
    first = "1" if "1" in by_concurrency else str(given.concurrency[0])
    described = {"trained_prompts": trained.num_prompts, "replayed_prompts": trace.num_prompts}
    described |= {"replayed_tokens": trace.num_tokens, "predict_every": given.predict_every} | cost
    return {"replay": by_concurrency[first], "replay_concurrent": by_concurrency, "setting": described}


def _cost(expert_bytes: str, link_bandwidth: str) -> dict[str, float]:
    size, bandwidth = parse_bytes("--expert-bytes", expert_bytes), parse_bandwidth(link_bandwidth, "--link-bandwidth")
    if size < 1 or bandwidth is None:
        raise ConfigError(f"--expert-bytes is {expert_bytes}; it must be more than 0")
    return {"expert_bytes": float(size), "link_bandwidth": bandwidth}


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    keep_compilations()  # cells of the same slots run the same executables
    main()
