"""Some of the experts resident, and the memory that frees for more sequences, against all of them resident.

The device is as small as it can be for all experts and the KV cache of a given number of full sequences: there full
residency runs out of KV. With fewer experts resident the same memory holds more sequences. A server of each kind gets
as many as it has room for; full residency serves first come, first served, the other by deadlines.
"""

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.serving.client import closed_loop, connected
from benchmarks.serving.intervals import ratio_interval
from benchmarks.serving.live import Report, Traffic, end_to_end, in_turns
from benchmarks.serving.report import Record, summary
from benchmarks.serving.server import started_server
from benchmarks.serving.settings import ALL
from emoe_jax.config import ModelConfig
from emoe_jax.memory.plan import WORKSPACE_SHARE, MemoryPlan
from emoe_jax.models import config_from_directory
from emoe_jax.scheduling.pages import pages_for
from serve.options import parse_options

MAX_BATCH = 4096
"""What the server takes."""
ASKED = 16
"""How often a user asks in a loop that compares throughput, so that batches of different sizes are full most of it."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """Sequences of `max_model_len` tokens that fit a device of `device_bytes`, by what is resident."""

    device_bytes: int
    max_model_len: int
    full: int
    partial: int

    @classmethod
    def of(cls, config: ModelConfig, dtype: str, share: str, max_model_len: int, full: int) -> "Batches":
        """The smallest device for all experts and `full` sequences, and what it holds with `share` of the experts."""

        def plan(device_bytes: int, expert_memory: str, batch: int) -> MemoryPlan:
            return MemoryPlan.of(
                config,
                platform="cpu",
                device_bytes=device_bytes,
                dtype=dtype,
                expert_memory=expert_memory,
                max_model_len=max_model_len,
                max_num_seqs=batch,
            )

        needed = plan(2**60, "100%", full)
        used = needed.dense_bytes + needed.slab_bytes + needed.kv_bytes
        device = math.ceil(used / (1 - WORKSPACE_SHARE)) + 1  # usable bytes are rounded down
        pages = plan(device, share, MAX_BATCH).num_pages - 1
        return cls(device, max_model_len, full, pages // pages_for(max_model_len))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A server of a comparison: its name, and the arguments that only it has."""

    name: str
    arguments: tuple[str, ...]

    @classmethod
    def of(cls, name: str, share: str, batch: int, *arguments: str) -> "Kind":
        """With this share of the experts resident, and so many sequences at once."""
        return cls(name, ("--expert-memory", share, "--max-num-seqs", str(batch), *arguments))


def pair_of(share: str, batches: Batches) -> list[Kind]:
    """All experts, first come, first served; and `share` of them, by deadlines."""
    return [
        Kind.of(f"{ALL} resident", ALL, batches.full, "--scheduling-policy", "fcfs"),
        Kind.of(f"{share} resident", share, batches.partial, "--scheduling-policy", "slo"),
    ]


def on_one_device(share: str, full_batch: int, load: Traffic, arguments: Sequence[str]) -> tuple[Batches, list[str]]:
    """What fits beside `share` of the experts where all of them leave room for `full_batch` sequences, and the flags
    that the servers of both have.
    """
    options = parse_options(arguments)
    dtype = "float32" if options.dtype == "auto" else options.dtype
    length = options.length_limit or load.longest
    batches = Batches.of(config_from_directory(options.model), dtype, share, length, full_batch)
    return batches, ["--dtype", dtype, "--max-model-len", str(length)]


def run_comparison(
    share: str,
    full_batch: int,
    load: Traffic,
    arguments: Sequence[str],
    report: Report,
    kinds_of: Callable[[str, Batches], Sequence[Kind]] = pair_of,
) -> tuple[Batches, dict[str, Any]]:
    """Ratios of `share` resident to all resident, and the runs they come from. Raises `ServerFailed`.

    `throughput_ratio`, `requests_ratio`: tokens/s and requests/s of a closed loop with equally many users; they differ
    where missing experts make answers longer or shorter. `mean_latency_ratios`: at each of the load's rates, which are
    shares of what full residency can do. These are geometric means over the turns, with `low` and `high` of their 95 %
    interval. `max_batch_ratio`: sequences that fit, by arithmetic. All are of the second of `kinds_of(share, batches)`
    to the first.
    Sequences are as long as `--max-model-len` of the server's `arguments`, or the load's longest; weights are float32
    unless they name another `--dtype`.
    """
    batches, flags = on_one_device(share, full_batch, load, arguments)
    load = dataclasses.replace(load, concurrency=max(batches.partial, batches.full), asked=ASKED)
    flags += ["--max-num-queued-reqs", str(load.queued)]
    with contextlib.ExitStack() as stack:
        urls = {}
        for kind in kinds_of(share, batches):
            report(f"starting a server: {kind.name}")
            urls[kind.name] = stack.enter_context(started_server([*arguments, *flags, *kind.arguments]))
        measured = asyncio.run(_compare(urls, load, report))
    ratio = {"max_batch_ratio": batches.partial / batches.full, "batches": dataclasses.asdict(batches)}
    return batches, measured | ratio


async def _compare(urls: dict[str, str], load: Traffic, report: Report) -> dict[str, Any]:
    full, partial = [*urls][:2]
    async with contextlib.AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(connected(url, load.max_tokens)) for name, url in urls.items()}
        loops: dict[str, list[list[Record]]] = {name: [] for name in clients}
        report(f"a closed loop of {load.users} users")
        for turn in range(load.turns):
            names = list(clients)
            first = turn % len(names)
            for name in names[first:] + names[:first]:  # whoever comes first finds another machine than who comes last
                client = clients[name]
                loops[name].append(await closed_loop(client, load.saturating(turn), load.users))
        saturated = {name: summary(end_to_end(parts)) for name, parts in loops.items()}
        runs, latencies = [], {}
        for fraction in load.fractions:
            run = await in_turns(clients, load, fraction, [full], report)
            ours, theirs = run.mean_latencies(partial), run.mean_latencies(full)
            latencies[f"{fraction:g}"] = ratio_interval(ours, theirs)
            runs += run.summaries()
    ratios = {}
    for name, key in (("throughput", "throughput_tok_s"), ("requests", "throughput_rps")):
        ours, theirs = ([summary(part)[key] for part in loops[name]] for name in (partial, full))
        ratios[f"{name}_ratio"] = ratio_interval(ours, theirs)
    return ratios | {
        "mean_latency_ratios": latencies,
        "saturated": saturated,
        "runs": runs,
    }
