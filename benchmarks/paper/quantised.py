"""Table 3: leaving experts out against rounding all weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.memory.needs import Needs
from benchmarks.paper.bench import CONCURRENCY, ENGINE, SHARE, Bench, numbers_of
from benchmarks.paper.claim import Claim, Conclusion, Numbers
from benchmarks.quality.measure import measure
from benchmarks.quality.quantised import quantise
from benchmarks.quality.served import Cell
from emoe_jax.models import config_from_directory, open_checkpoint

_PLAIN = "all experts, bf16"
_EMOE, _INT8, _INT4, _BOTH = (
    f"emoe {SHARE:.0%}, bf16",
    "all experts, int8",
    "all experts, int4",
    f"emoe {SHARE:.0%}, int8",
)


def measured(bench: Bench) -> Numbers:
    """By variant: bytes of the weights on the device, and similarity to the answers of all experts unrounded."""
    (emoe,) = bench.cells([Cell("emoe", "resident", SHARE)])

    def rounded() -> Numbers:
        directory = open_checkpoint(bench.model).directory
        found: Numbers = {}
        with tempfile.TemporaryDirectory() as folder:
            sizes, grid = {}, {}
            for bits in (8, 4):
                out = Path(folder) / f"int{bits}"
                sizes[bits] = quantise(directory, out, bits)
                grid[f"all experts, int{bits}"] = Cell("static", "resident", 1.0, model=str(out))
            grid[_BOTH] = Cell("emoe", "resident", SHARE, model=str(Path(folder) / "int8"))
            done = measure(bench.model, [*grid.values()], bench.traffic(), CONCURRENCY, bench.seed, 1, bench.start)
            next(done)  # the reference
            for name, cell in zip(grid, done, strict=True):
                found[name] = numbers_of(cell)["means"]["similarity"]
        return {"similarity": found, "bytes": {str(bits): of._asdict() for bits, of in sizes.items()}}

    sizes = {"prompts": bench.sizes.prompts, "stretches": bench.sizes.stretches}
    of = bench.kept("rounded weights", sizes, (*ENGINE, "benchmarks/quality"), rounded)
    config = config_from_directory(bench.model)
    share = Needs.of(config, SHARE, "bfloat16").slab / Needs.of(config, 1.0, "bfloat16").slab
    eight, four = of["bytes"]["8"], of["bytes"]["4"]
    sizes = {
        _PLAIN: eight["before"],
        _EMOE: eight["before"] - (1 - share) * eight["experts_before"],
        _INT8: eight["after"],
        _INT4: four["after"],
        _BOTH: eight["after"] - (1 - share) * eight["experts_after"],
    }
    alike = {_PLAIN: [1.0, 1.0, 1.0], _EMOE: emoe["means"]["similarity"], **of["similarity"]}
    return {name: {"bytes": size, "similarity": alike[name]} for name, size in sizes.items()}


def conclude(numbers: Numbers) -> Conclusion:
    """More alike than rounded weights, at about the memory of eight bits."""
    plain = numbers[_PLAIN]["bytes"]
    here = "; ".join(
        f"{name}: {of['bytes'] / plain:.0%} of the weights' memory, {of['similarity'][0]:.1%}"
        for name, of in numbers.items()
        if name != _PLAIN
    )
    ours, eight = numbers[_EMOE]["similarity"][0], numbers[_INT8]["similarity"][0]
    if ours >= eight:
        return Conclusion(here, "yes")
    sizes = {name: numbers[name]["bytes"] / plain for name in (_EMOE, _INT8, _BOTH)}
    reason = (
        f"eight bits change the demo's answers less than missing experts do, at {sizes[_INT8]:.0%} of the memory "
        f"against {sizes[_EMOE]:.0%}; both together take {sizes[_BOTH]:.0%}"
    )
    return Conclusion(here, "no", reason)


def plot(numbers: Numbers, figure: Any) -> None:
    """Similarity against memory."""
    axis = figure.subplots()
    plain = numbers[_PLAIN]["bytes"]
    for name, of in numbers.items():
        mean, low, high = of["similarity"]
        axis.errorbar(100 * of["bytes"] / plain, mean, [[mean - low], [high - mean]], marker="o", capsize=3, label=name)
    axis.set(
        xlabel="memory of the weights, % of all experts in bf16", ylabel="similarity", xlim=(0, 105), ylim=(0, 1.05)
    )
    axis.legend()


CLAIMS = (
    Claim(
        "table3",
        "memory and accuracy against quantised weights",
        "eMoE 64.5 GB, 98.2 %; 8-bit 57.8 GB, 95.2 %; 4-bit 30.5 GB, 91.5 %",
        "live",
        "python -m benchmarks.paper --only table3",
        measured,
        conclude,
        plot,
    ),
)
