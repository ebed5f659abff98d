"""python -m benchmarks.serving: scheduling policies under load.

`--simulate` runs the real scheduler against a cost model on a virtual clock. Without it the requests go over
HTTP to a server that is started for it, or to `--url`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.serving.devices import DEVICES
from benchmarks.serving.simulated import poisson_workload, run_simulated, trace_workload
from benchmarks.serving.tables import plot_runs, print_runs
from emoe_jax.errors import EmoeError
from emoe_jax.scheduling.registry import POLICIES


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        device = DEVICES[options.device]
        if options.trace:
            workload = trace_workload(device, options.trace, options.seconds, options.slo_scale)
        else:
            workload = poisson_workload(device, options.requests, options.seed, options.slo_scale)
        runs = run_simulated(workload, device, options.policy, options.rates, options.seed)
    except EmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    title = f"{workload.name} on {options.device} (simulated), capacity {workload.capacity:.2f} requests/s"
    print_runs(runs, title)
    if options.json:
        report = {"workload": workload.name, "device": options.device, "capacity_rps": workload.capacity, "runs": runs}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot_runs(runs, options.plot, title)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Scheduling policies under load.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--simulate", action="store_true", help="a cost model on a virtual clock instead of a server")
    add("--policy", nargs="+", choices=POLICIES, default=["fcfs", "slo"], help="scheduling policies to compare")
    add("--rates", nargs="+", type=_positive, default=[0.7, 0.95], metavar="SHARE", help="arrival rates over capacity")
    add("--requests", type=int, default=2000, help="requests of a Poisson run")
    add("--trace", nargs="+", metavar="CSV", help="recorded arrivals instead of the five tasks; each file is a task")
    add("--seconds", type=_positive, default=600.0, help="how much of the traces is replayed")
    add("--device", choices=sorted(DEVICES), default="demo", help="the machine to simulate")
    add("--slo-scale", type=_positive, default=5.0, help="deadlines, as multiples of an idle machine's times")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="write the numbers here")
    add("--plot", metavar="FILE.png", help="draw them here")
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
