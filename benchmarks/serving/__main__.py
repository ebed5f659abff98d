"""python -m benchmarks.serving: scheduling policies under load.

Requests go over HTTP to servers that are started for it, one per policy, or to `--url`. `--simulate` runs the real
scheduler against a cost model on a virtual clock instead.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.arguments import count, positive
from benchmarks.serving.devices import DEVICES
from benchmarks.serving.simulated import poisson_workload, run_simulated, trace_workload
from benchmarks.serving.tables import plot_runs, print_ratios, print_runs
from benchmarks.serving.workload import demo_samples
from emoe_jax.errors import ConfigError, EmoeError, one_line
from emoe_jax.scheduling.registry import POLICIES


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        title, report = _simulated(options) if options.simulate else _live(options)
        print_runs(report["runs"], title)
        if "max_batch_ratio" in report:
            print_ratios(report)
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
        if options.plot:
            plot_runs(report["runs"], options.plot, title)
    except (EmoeError, ImportError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _simulated(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    device = DEVICES[options.device]
    if options.trace:
        workload = trace_workload(device, options.trace, options.seconds, options.slo_scale)
    else:
        workload = poisson_workload(device, options.requests, options.seed, options.slo_scale)
    runs = run_simulated(workload, device, options.policy, options.rates, options.seed)
    title = f"{workload.name} on {options.device} (simulated), capacity {workload.capacity:.2f} requests/s"
    report = {"workload": workload.name, "device": options.device, "capacity_rps": workload.capacity, "runs": runs}
    return title, report


def _live(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Needs httpx, which `--simulate` does not."""
    from benchmarks.serving.compare import run_comparison
    from benchmarks.serving.live import Load, run_live, servers_of

    if options.trace:
        raise ConfigError("--trace has no prompts to send; replay it with --simulate")
    console = Console(stderr=True)

    def progress(text: str) -> None:
        console.print(text, style="dim", markup=False, highlight=False)

    load = Load(
        demo_samples(),
        options.rates,
        options.requests,
        options.concurrency,
        options.slo_scale,
        options.max_tokens,
        options.seed,
        options.turns,
    )
    if options.compare_residency:
        batches, report = run_comparison(
            options.compare_residency, options.full_batch, load, options.server_args, progress
        )
        return f"{options.compare_residency} against all experts, {batches.device_bytes / 1e6:.0f} MB of device", report
    if options.url:
        report = run_live([options.url], load, progress)
    else:
        with servers_of(options.policy, options.server_args, load, progress) as urls:
            report = run_live(urls, load, progress)
    return f"five tasks, Poisson, over HTTP, capacity {report['capacity_rps']:.2f} requests/s", report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Scheduling policies under load.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--policy", nargs="+", choices=POLICIES, default=["fcfs", "slo"], help="scheduling policies to compare")
    add("--rates", nargs="+", type=positive, default=[0.7, 0.95], metavar="SHARE", help="arrival rates over capacity")
    add("--requests", type=count, default=2000, help="requests of a Poisson run")
    add("--slo-scale", type=positive, default=5.0, help="deadlines, as multiples of an idle machine's times")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="write the numbers here")
    add("--plot", metavar="FILE.png", help="draw them here")
    live = parser.add_argument_group("against a server").add_argument
    live("--url", help="a running server, with the policy that it has (default: start one per policy)")
    live("--concurrency", type=count, default=16, help="the servers' batch; twice as many users tell their capacity")
    live("--turns", type=count, default=8, help="parts of a run, each at shares of what the servers can do just then")
    live("--max-tokens", type=count, default=128, help="tokens of an answer at most")
    live(
        "--compare-residency",
        metavar="SHARE",
        help="instead: servers with this share of experts resident, for example 40%%, and with all, on equal memory",
    )
    live("--full-batch", type=count, default=4, help="sequences that then fit beside all experts")
    live("--server-args", nargs=argparse.REMAINDER, default=[], help="the rest of the line goes to the started servers")
    simulated = parser.add_argument_group("with --simulate").add_argument
    simulated("--simulate", action="store_true", help="a cost model on a virtual clock instead of a server")
    simulated("--device", choices=sorted(DEVICES), default="demo", help="the machine to simulate")
    simulated("--trace", nargs="+", metavar="CSV", help="recorded arrivals instead of the five tasks; a file is a task")
    simulated("--seconds", type=positive, default=600.0, help="how much of the traces is replayed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
