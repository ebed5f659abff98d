"""How fast experts get into the slab, and how much memory that takes: `python -m benchmarks.loading --json FILE`.

- `stage_commit_fraction`: bytes/s of `ExpertLoader` from host memory into the slab, as a share of what `memcpy` reaches
  on records of the same size, measured in turns.
- `commit_scaling`: time to commit one expert in a slab of 128 slots over that in one of 16, measured in turns.
- `tier_share`: of exchanges after the start, those whose expert came from host memory. It has room for the experts that
  are not on the device. `tier_share_unfilled` is the same where nothing fills it but loads.
- `peak_rss_fraction`: what loading a checkpoint adds to the peak resident memory of a process, beyond the slab and the
  weights that are not experts, as a share of the expert bytes. Worst of loading half and all of the experts.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from emoe_jax.amounts import parse_expert_memory
from emoe_jax.checkpoint.safetensors import STORED_DTYPES
from emoe_jax.checkpoint.stored_format import stored_tensors
from emoe_jax.config import ModelConfig
from emoe_jax.experts.loader import ExpertLoader
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.experts.slab import ExpertSlab
from emoe_jax.experts.store import ExpertStore, aligned_record
from emoe_jax.experts.table import SlotTable
from emoe_jax.memory.budget import capacities
from emoe_jax.models import config_from_hf, family_of, load_dense, open_checkpoint
from emoe_jax.policies import make_policy

# A Mixtral of which one expert takes 25 MB in f32: the size at which large models move experts.
MODEL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "torch_dtype": "float32",
}


def write_sparse_checkpoint(directory: Path, raw: dict[str, Any]) -> ModelConfig:
    """A valid checkpoint whose tensors are holes in the file: zeros that take no disk but are read like any others."""
    config = config_from_hf(raw)
    family = family_of(raw)
    dtype = {"float32": "F32", "bfloat16": "BF16"}[raw["torch_dtype"]]
    tensors = {part.name: (part.shape, dtype) for parts in family.dense_tensors(config).values() for part in parts}
    for layer in config.moe_layers:
        for expert in range(config.num_experts):
            source = family.expert_sources(config, layer, expert)[0]
            tensors |= {part.name: (part.shape, dtype) for part in source.biases}
            for part in (part for parts in source.projections for part in parts):
                for stored in stored_tensors(part, config.expert_format):
                    tensors[stored.part.name] = stored.part.shape, dtype if dtype in stored.dtypes else stored.dtypes[0]
    header: dict[str, Any] = {}
    offset = 0
    for name, (shape, stored_as) in tensors.items():
        end = offset + int(np.prod(shape, dtype=np.int64)) * STORED_DTYPES[stored_as].itemsize
        header[name] = {"dtype": stored_as, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)
    (directory / "config.json").write_text(json.dumps(raw))
    return config


def measure_stage_commit(directory: Path, rounds: int) -> dict[str, float]:
    """Bytes/s of memcpy and of the loader, from the host tier and from files in the page cache, in turns."""
    config = write_sparse_checkpoint(directory, MODEL)
    record_format = RecordFormat.of(config, "float32")
    E, half = config.num_experts, config.num_experts // 2
    reader = open_checkpoint(directory)
    slab = ExpertSlab(record_format, [half])
    in_memory = ExpertStore(reader, record_format, 1, E, E * record_format.nbytes)
    records = [np.asarray(in_memory.read(0, expert)) for expert in range(E)]
    target = np.stack([aligned_record(record_format) for _ in range(half)])
    on_disk = ExpertStore(reader, record_format, 1, E)
    first, second = range(half), range(half, E)

    def memcpy() -> None:
        for slot, expert in enumerate(first):
            np.copyto(target[slot], records[expert])

    def replace(loader: ExpertLoader, old: range, new: range) -> None:
        loaded = loader.load_now(0, new, old)
        assert loaded == half, f"{loaded} experts were loaded where {half} were to be measured"
        slab.block_until_ready(0)

    table = SlotTable([half], E, sharding=slab.sharding)
    with ExpertLoader(in_memory, slab, table) as warm, ExpertLoader(on_disk, slab, table) as cold:
        warm.fill([second])
        times = _in_turns(
            rounds,
            {
                "memcpy": memcpy,
                "host": lambda: replace(warm, second, first),
                "memcpy again": memcpy,
                "file": lambda: replace(cold, first, second),
            },
        )
    moved = half * record_format.nbytes
    return {
        "expert_bytes": record_format.nbytes,
        "memcpy_bytes_per_s": moved / statistics.median(times["memcpy"]),
        "stage_commit_bytes_per_s": moved / statistics.median(times["host"]),
        "stage_commit_fraction": _ratio(times["memcpy"], times["host"]),
        "from_file_bytes_per_s": moved / statistics.median(times["file"]),
        "from_file_fraction": _ratio(times["memcpy again"], times["file"]),
    }


def measure_tier(directory: Path, exchanges: int, filled: bool, pause: float = 0.05) -> float:
    """Share of loads from host memory. Experts of one layer, half of which are resident, are exchanged at random."""
    config = write_sparse_checkpoint(directory, MODEL)
    record_format, E = RecordFormat.of(config, "float32"), config.num_experts
    store = ExpertStore(open_checkpoint(directory), record_format, 1, E, E // 2 * record_format.nbytes)
    slab = ExpertSlab(record_format, [E // 2])
    table = SlotTable([E // 2], E, sharding=slab.sharding)
    rng = np.random.default_rng(0)
    with contextlib.closing(store), ExpertLoader(store, slab, table) as loader:
        loader.fill([range(E // 2)])
        if filled:
            store.start_filling((0, expert) for expert in range(E))
            while store.stats.host_bytes < E // 2 * record_format.nbytes:
                time.sleep(0.01)
        for _ in range(exchanges):
            absent, resident = np.flatnonzero(~table.resident_mask[0]), table.resident(0)
            loader.request(0, int(rng.choice(absent)), evict=int(rng.choice(resident)))
            loader.wait_idle()
            loader.commit()
            time.sleep(pause)  # steps that the exchanged experts serve
        return store.stats.hits / exchanges


def measure_commit_scaling(rounds: int, small: int = 16, large: int = 128) -> dict[str, float]:
    """Seconds to commit one 6 MB expert in slabs of two sizes, in turns."""
    record_format = RecordFormat.plain((2048, 512), (512, 1024), np.dtype(np.float32))
    record = aligned_record(record_format)
    record[:] = 1
    slabs = {slots: ExpertSlab(record_format, [slots]) for slots in (small, large)}
    staged = slabs[small].stage(record)
    turn = iter(range(10**9))

    def commit(slots: int) -> Callable[[], None]:
        def run() -> None:
            slabs[slots].commit(0, [staged], [next(turn) % slots])
            slabs[slots].block_until_ready(0)

        return run

    for slots in slabs:  # touch every page once
        for _ in range(slots):
            commit(slots)()
    times = _in_turns(rounds, {str(slots): commit(slots) for slots in slabs})
    return {
        "commit_scaling": _ratio(times[str(large)], times[str(small)]),
        f"commit_seconds_{small}_slots": statistics.median(times[str(small)]),
        f"commit_seconds_{large}_slots": statistics.median(times[str(large)]),
    }


def measure_peak_rss(
    directory: Path, raw: dict[str, Any], budgets: tuple[str, ...] = ("50%", "100%"), expert_format: str | None = None
) -> dict[str, Any]:
    """Load a checkpoint in a process of its own for each budget; the worst fraction and all numbers. Experts are kept
    in `expert_format`, or in the checkpoint's dtype."""
    write_sparse_checkpoint(directory, raw)
    probes = []
    for budget in budgets:
        command = [sys.executable, "-m", "benchmarks.loading", "--probe", str(directory), budget]
        command.append(expert_format or raw["torch_dtype"])
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        probes.append({"budget": budget, **json.loads(output.splitlines()[-1])})
    return {"peak_rss_fraction": max(probe["fraction"] for probe in probes), "peak_rss": probes}


def probe_peak_rss(directory: Path, budget: str, expert_format: str) -> dict[str, float]:
    """Load dense weights and experts as the engine does; bytes of peak memory by what they are for."""
    checkpoint = open_checkpoint(directory)
    config = checkpoint.config
    record_format = RecordFormat.of(config, expert_format)
    jax.block_until_ready(jnp.zeros(8) + 1)
    before = _memory("VmRSS")
    slots = capacities(config, record_format, parse_expert_memory(budget))
    _, dense = load_dense(checkpoint, config.dtype)
    slab = ExpertSlab(record_format, slots)
    table = SlotTable(slots, config.num_experts, sharding=slab.sharding)
    store = ExpertStore(checkpoint, record_format, len(slots), config.num_experts)
    began = time.perf_counter()
    with ExpertLoader(store, slab, table) as loader:
        loader.fill(make_policy("static", len(slots), config.num_experts).initial(slots))
    seconds = time.perf_counter() - began
    dense_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(dense))
    expert_bytes = len(slots) * config.num_experts * record_format.nbytes
    above = _memory("VmHWM") - before - slab.nbytes - dense_bytes
    return {
        "fraction": above / expert_bytes,
        "above_bytes": above,
        "process_bytes": before,
        "slab_bytes": slab.nbytes,
        "dense_bytes": dense_bytes,
        "expert_bytes": expert_bytes,
        "fill_seconds": seconds,
    }


def _in_turns(rounds: int, measured: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of each, run one after the other in every round so that a noisy machine is noisy for all."""
    times: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds + 2):
        for name, run in measured.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: seconds[2:] for name, seconds in times.items()}


def _ratio(above: list[float], below: list[float]) -> float:
    """Median of the rounds' ratios: both sides of each were measured within the same moment."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _memory(field: str) -> int:
    """Bytes of this process by `/proc/self/status`: `VmRSS` now, `VmHWM` at most.

    Not `ru_maxrss`, which a child process inherits from the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _show(results: dict[str, Any]) -> None:
    table = Table(title="Expert loading")
    for column in ("measure", "value", "must be"):
        table.add_column(column)

    def rate(name: str) -> str:
        return f"{results[name] / 1e9:.2f} GB/s"

    table.add_row(f"memcpy of {results['expert_bytes'] / 1e6:.0f} MB records", rate("memcpy_bytes_per_s"), "")
    table.add_row("stage + commit from host memory", rate("stage_commit_bytes_per_s"), "")
    table.add_row("  as a share of memcpy", f"{results['stage_commit_fraction']:.3f}", ">= 0.80")
    table.add_row("stage + commit from files (page cache)", rate("from_file_bytes_per_s"), "")
    table.add_row("  as a share of memcpy", f"{results['from_file_fraction']:.3f}", "")
    table.add_row("exchanges from host memory, filled in the background", f"{results['tier_share']:.0%}", ">= 95%")
    table.add_row("  filled by loads alone", f"{results['tier_share_unfilled']:.0%}", "")
    for slots in (16, 128):
        milliseconds = results[f"commit_seconds_{slots}_slots"] * 1e3
        table.add_row(f"commit of one 6 MB expert, {slots} slots", f"{milliseconds:.3f} ms", "")
    table.add_row("  128 slots over 16", f"{results['commit_scaling']:.3f}", "0.80 to 1.20")
    for probe in results["peak_rss"]:
        table.add_row(
            f"peak memory above slab and dense weights, {probe['budget']} of {probe['expert_bytes'] / 1e9:.2f} GB",
            f"{probe['above_bytes'] / 1e6:.0f} MB",
            "",
        )
    table.add_row("  as a share of the expert bytes", f"{results['peak_rss_fraction']:.3f}", "< 0.15")
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description="Measure how experts are loaded.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--rounds", type=int, default=61, help="rounds of each timing (default 61)")
    parser.add_argument("--probe", nargs=3, metavar=("DIR", "BUDGET", "FORMAT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.probe:
        print(json.dumps(probe_peak_rss(Path(options.probe[0]), *options.probe[1:])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        # 4 layers x 16 experts of 25 MB: 1.6 GB of experts.
        results = measure_peak_rss(Path(temporary) / "gigabyte", MODEL | {"num_hidden_layers": 4})
        results |= measure_stage_commit(Path(temporary) / "one_layer", options.rounds)
        for name, filled in (("tier_share", True), ("tier_share_unfilled", False)):
            results[name] = measure_tier(Path(temporary) / "one_layer", options.rounds, filled)
        results |= measure_commit_scaling(4 * options.rounds)
    _show(results)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
