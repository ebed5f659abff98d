"""python -m benchmarks.serving: scheduling policies under load.

Requests go over HTTP to servers that are started for it, one per policy, or to `--url`. `--simulate` runs the real
scheduler against a cost model on a virtual clock instead. Each `--residency` and `--routing` is a setting of its own,
with its own capacity and deadlines. `--simulate --replicas N` puts N simulated engines behind each way to choose one.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.arguments import count, positive
from benchmarks.results import write_json
from benchmarks.serving.devices import DEVICES
from benchmarks.serving.intervals import differences, over_seeds
from benchmarks.serving.replicas import TRAFFICS, run_replicas
from benchmarks.serving.settings import Setting, settings_of
from benchmarks.serving.simulated import machine_of, poisson_workload, run_simulated, trace_workload
from benchmarks.serving.tables import plot_runs, print_intervals, print_ratios, print_replicas, print_runs
from benchmarks.serving.workload import demo_samples
from emoe_jax.errors import ConfigError, EmoeError, one_line, require
from emoe_jax.requests.contract import CONTRACTS
from emoe_jax.scheduling.registry import PARTS, SCHEDULING_POLICIES, VARIANTS, without
from emoe_jax.scheduling.replicas import ROUTINGS, THRESHOLD

SCARCE = "40%"
"""Resident experts of replicas where --residency says nothing: with all of them resident, all replicas are alike."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        settings = settings_of(options.residency or ([SCARCE] if options.replicas else None), options.routing)
        if options.replicas:
            report = _replicated(options, settings)
            print_replicas(report["runs"], report["workload"])
            if options.json:
                write_json(report, Path(options.json))
            return 0
        if options.plot and (len(settings) > 1 or options.seeds > 1):
            raise ConfigError("--plot draws one setting and one seed")
        if options.plot:
            require("matplotlib")
        title, report = _simulated(options, settings) if options.simulate else _live(options, settings)
        if options.seeds > 1 or len(settings) > 1:
            report |= {"intervals": over_seeds(report["runs"]), "differences": differences(report["runs"])}
            print_intervals(report, title)
        else:
            print_runs(report["runs"], title)
        if "max_batch_ratio" in report:
            print_ratios(report)
        if options.json:
            write_json(report, Path(options.json))
        if options.plot:
            plot_runs(report["runs"], options.plot, title)
    except (EmoeError, ImportError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _policies(options: argparse.Namespace, usual: Sequence[str] = ("fcfs", "slo")) -> list[str]:
    return list(dict.fromkeys([*(options.policy or usual), *map(without, options.without)]))


def _seeds(options: argparse.Namespace) -> range:
    return range(options.seed, options.seed + options.seeds)


def _simulated(options: argparse.Namespace, settings: Sequence[Setting]) -> tuple[str, dict[str, Any]]:
    runs, capacities, name = [], [], ""
    for setting in settings:
        machine = machine_of(DEVICES[options.device], setting, bool(options.trace))
        if options.trace:
            workload = trace_workload(machine, options.trace, options.seconds, options.slo_scale)
        else:
            workload = poisson_workload(machine, options.requests, options.seed, options.slo_scale)
        runs += run_simulated(workload, machine, _policies(options), options.rates, _seeds(options))
        name, capacities = workload.name, [*capacities, workload.capacity]
    told = ", ".join(f"{capacity:.2f}" for capacity in capacities)
    title = f"{name} on {options.device} (simulated), capacity {told} requests/s"
    return title, {"workload": name, "device": options.device, "capacity_rps": capacities[0], "runs": runs}


def _replicated(options: argparse.Namespace, settings: Sequence[Setting]) -> dict[str, Any]:
    if not options.simulate or options.trace or options.plot:
        raise ConfigError("--replicas is for --simulate, without --trace and --plot")
    console = Console(stderr=True)
    runs = [
        run
        for setting in settings
        for policy in _policies(options, ("slo",))
        for number in options.replicas
        for run in run_replicas(
            machine_of(DEVICES[options.device], setting, False),
            number,
            traffics=options.traffic,
            routings=options.replica_routing,
            thresholds=options.threshold,
            policy=policy,
            requests=options.requests,
            fractions=options.rates,
            seeds=_seeds(options),
            slo_scale=options.slo_scale,
            progress=lambda text: console.print(text, style="dim", markup=False, highlight=False),
        )
    ]
    return {"workload": f"replicas of {options.device} (simulated), five tasks", "device": options.device, "runs": runs}


def _live(options: argparse.Namespace, settings: Sequence[Setting]) -> tuple[str, dict[str, Any]]:
    """Needs httpx, which `--simulate` does not."""
    from benchmarks.serving.compare import run_comparison
    from benchmarks.serving.live import Traffic, run_live, servers_of

    if options.in_process and (options.url or options.compare_residency):
        raise ConfigError("--in-process has no servers, for --url or --compare-residency")
    if settings != [Setting()] and (options.url or options.compare_residency):
        raise ConfigError(
            "--residency and --routing are for servers that are started, and not with --compare-residency"
        )
    if options.trace:
        raise ConfigError("--trace has no prompts to send; replay it with --simulate")
    console = Console(stderr=True)

    def progress(text: str) -> None:
        console.print(text, style="dim", markup=False, highlight=False)

    load = Traffic(
        demo_samples(),
        options.rates,
        options.requests,
        options.concurrency,
        options.slo_scale,
        options.max_tokens,
        options.seed,
        options.turns,
        options.fixed_lengths,
    )
    if options.compare_residency:
        batches, report = run_comparison(
            options.compare_residency, options.full_batch, load, options.server_args, progress
        )
        return f"{options.compare_residency} against all experts, {batches.device_bytes / 1e6:.0f} MB of device", report
    loads = [dataclasses.replace(load, seed=seed) for seed in _seeds(options)]
    reports: list[dict[str, Any]] = []

    def runs() -> list[dict[str, Any]]:
        return [run for report in reports for run in report["runs"]]

    def keep(report: dict[str, Any]) -> None:
        reports.append(report)
        if options.json:  # what there is, should a later run fail
            engines = [report["engine"] for report in reports if "engine" in report]
            write_json({"runs": runs(), "engines": engines}, Path(options.json))

    if options.in_process:
        from benchmarks.serving.in_process import run_in_process

        run_in_process(settings, _policies(options), options.server_args, loads, progress, keep)
        engines = [report["engine"] for report in reports]
        return _title(reports, "in this process"), {**reports[0], "runs": runs(), "engines": engines}
    for setting in settings:
        with contextlib.ExitStack() as stack:
            urls = [options.url]
            if not options.url:
                arguments = [*setting.server_arguments, *options.server_args]
                urls = stack.enter_context(servers_of(_policies(options), arguments, load, progress))
            for load in loads:
                keep(setting.of(run_live(urls, load, progress), load.seed))
    return _title(reports, "over HTTP"), {**reports[0], "runs": runs()}


def _title(reports: Sequence[dict[str, Any]], where: str) -> str:
    told = ", ".join(f"{report['capacity_rps']:.2f}" for report in reports)
    return f"five tasks, Poisson, {where}, capacity {told} requests/s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Scheduling policies under load.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    choices = [*SCHEDULING_POLICIES, *VARIANTS]
    add(
        "--policy",
        nargs="+",
        choices=choices,
        metavar="NAME",
        help=f"{' or '.join(SCHEDULING_POLICIES)}; without it both, with --replicas slo",
    )
    add("--without", nargs="+", choices=PARTS, default=[], metavar="PART", help="also slo less one of its parts")
    add("--residency", nargs="+", metavar="SHARE", help="resident experts, for example 100%% 40%%: a setting each")
    add("--routing", nargs="+", choices=CONTRACTS, metavar="CONTRACT", help="of all requests, likewise")
    add("--rates", nargs="+", type=positive, default=[0.7, 0.95], metavar="SHARE", help="arrival rates over capacity")
    add("--requests", type=count, default=2000, help="requests of a Poisson run")
    add("--slo-scale", type=positive, default=5.0, help="deadlines, as multiples of an idle machine's times")
    add("--seed", type=int, default=0, help="the first one")
    add("--seeds", type=count, default=1, help="runs with seeds one after the other; more than one give intervals")
    add("--json", metavar="FILE", help="write the numbers here")
    add("--plot", metavar="FILE.png", help="draw them here")
    live = parser.add_argument_group("against a server").add_argument
    live("--url", help="a running server, with the policy that it has (default: start one per policy)")
    live("--in-process", action="store_true", help="instead: one engine here, whose policies take turns, without HTTP")
    live("--concurrency", type=count, default=16, help="the servers' batch; twice as many users tell their capacity")
    live("--turns", type=count, default=8, help="parts of a run, each at shares of what the servers can do just then")
    live("--max-tokens", type=count, default=128, help="tokens of an answer at most")
    live(
        "--fixed-lengths",
        action="store_true",
        help="answers are as long as the reference answers; without, each server's experts decide when its answers end",
    )
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
    replicas = parser.add_argument_group("with --simulate --replicas").add_argument
    replicas(
        "--replicas",
        nargs="+",
        type=count,
        metavar="N",
        help=f"so many engines behind a router; --requests and --rates are of all of them, and without --residency "
        f"each has {SCARCE} resident".replace("%", "%%"),
    )
    replicas("--replica-routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS), help="how a replica is chosen")
    replicas("--traffic", nargs="+", choices=TRAFFICS, default=["mixed", "skewed"], help="all tasks alike, or one hot")
    replicas(
        "--threshold",
        nargs="+",
        type=int,
        default=[THRESHOLD],
        metavar="N",
        help="requests that a preferred replica may have beyond the least loaded one",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
