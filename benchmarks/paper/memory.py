"""Figures 17 and 18 (memory), and the headlines on prompts and batches: real models' shapes, by the engine's plan."""

from __future__ import annotations

from typing import Any

from benchmarks.memory.compiled import step_bytes
from benchmarks.memory.geometries import GEOMETRIES
from benchmarks.memory.needs import Workload, measure
from benchmarks.paper.bench import ENGINE, Bench
from benchmarks.paper.claim import Claim, Conclusion, Numbers
from emoe_jax.models import config_from_hf

SHARE = 0.6
MODELS = {"openmoe-8b": (16.0, 2.0), "mixtral-8x7b": (40.0, 4.5)}
"""The paper's ratios of prompt lengths and of batches."""
_LOAD = Workload(prompt_length=512, batch=4, output_tokens=0)
_DEVICE = 160 * 10**9
_CHUNK = 512
_COMMAND = "python -m benchmarks.memory --geometry mixtral-8x7b --shares 1.0 0.6"


def measured(bench: Bench) -> Numbers:
    """By model: bytes with all and with 60 % of the experts, what has room in the memory of all, and what a step takes,
    whatever is resident."""

    def of(name: str) -> Numbers:
        config = config_from_hf(GEOMETRIES[name])
        lengths, batches = [2**n for n in range(7, 16)], [2**n for n in range(8)]
        found = measure(config, "bfloat16", _DEVICE, [1.0, SHARE], _LOAD, lengths, batches)
        return {"needs": found, "step_bytes": step_bytes(config, SHARE, _LOAD.batch, _CHUNK)}

    code = (*ENGINE, "benchmarks/memory")
    return {name: bench.kept(f"memory-{name}", {"model": name}, code, lambda name=name: of(name)) for name in MODELS}


def _room(numbers: Numbers, name: str) -> dict[str, Any]:
    return numbers[name]["needs"][f"{SHARE:g}"]["same_memory"]


def _gigabytes(numbers: Numbers, name: str, share: float) -> float:
    of = numbers[name]
    return (of["needs"][f"{share:g}"]["memory"] + of["step_bytes"]) / 1e9


def prompts(numbers: Numbers) -> Conclusion:
    """Longer prompts at equal memory."""
    ratios = {name: _room(numbers, name)["prompt_ratio"] for name in MODELS}
    told = "; ".join(
        f"{name}: {_gigabytes(numbers, name, 1.0):.1f} GB -> {_gigabytes(numbers, name, SHARE):.1f} GB at 512 tokens, "
        f"{ratio:.0f}x longer prompts in equal memory"
        for name, ratio in ratios.items()
    )
    return _reached(told, {name: (ratios[name], least) for name, (least, _) in MODELS.items()})


def batches(numbers: Numbers) -> Conclusion:
    """Larger batches at equal memory."""
    ratios = {name: _room(numbers, name)["batch_ratio"] for name in MODELS}
    told = "; ".join(
        f"{name}: batch {_LOAD.batch} -> {_room(numbers, name)['largest_batch']} ({ratio:.1f}x)"
        for name, ratio in ratios.items()
    )
    return _reached(told, {name: (ratios[name], least) for name, (_, least) in MODELS.items()})


def longest(numbers: Numbers) -> Conclusion:
    """The headline on prompts, of Mixtral-8x7B."""
    ratio = _room(numbers, "mixtral-8x7b")["prompt_ratio"]
    return _reached(f"{ratio:.0f}x longer (Mixtral-8x7B, 60 % resident)", {"mixtral-8x7b": (ratio, 40.0)})


def largest(numbers: Numbers) -> Conclusion:
    """The headline on batches, of Mixtral-8x7B."""
    ratio = _room(numbers, "mixtral-8x7b")["batch_ratio"]
    return _reached(f"{ratio:.1f}x larger (Mixtral-8x7B, 60 % resident)", {"mixtral-8x7b": (ratio, 4.5)})


def _reached(here: str, ratios: dict[str, tuple[float, float]]) -> Conclusion:
    missed = [name for name, (ratio, least) in ratios.items() if ratio < least]
    if not missed:
        return Conclusion(here, "yes")
    reason = f"{', '.join(missed)} falls short of the paper's ratio: its experts are a smaller part of the memory"
    return Conclusion(here, "partly" if len(missed) < len(ratios) else "no", reason)


def plot_prompts(numbers: Numbers, figure: Any) -> None:
    """Memory by prompt length."""
    _plot(numbers, figure, "by_prompt_length", f"prompt tokens (batch {_LOAD.batch})")


def plot_batches(numbers: Numbers, figure: Any) -> None:
    """Memory by batch."""
    _plot(numbers, figure, "by_batch", f"batch (prompts of {_LOAD.prompt_length} tokens)")


def _plot(numbers: Numbers, figure: Any, key: str, label: str) -> None:
    for axis, name in zip(figure.subplots(1, len(numbers)), numbers, strict=True):
        for share in (1.0, SHARE):
            sizes = numbers[name]["needs"][f"{share:g}"][key]
            axis.plot(
                [int(value) for value in sizes],
                [(size + numbers[name]["step_bytes"]) / 1e9 for size in sizes.values()],
                marker=".",
                label=f"{share:.0%} resident",
            )
        axis.set(title=name, xlabel=label, ylabel="GB", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.legend()


CLAIMS = (
    Claim(
        "fig17",
        "prompt length at equal memory, 60 % resident",
        "16x (OpenMoE) and 40x (Mixtral) longer; Mixtral, 512 tokens: 96 GB -> 59 GB",
        "aot",
        _COMMAND,
        measured,
        prompts,
        plot_prompts,
    ),
    Claim(
        "fig18-memory",
        "batch at equal memory, 60 % resident",
        "2x (OpenMoE, 4 -> 8), 4.5x (Mixtral, 4 -> 18)",
        "aot",
        _COMMAND,
        measured,
        batches,
        plot_batches,
    ),
    Claim("headline-prompts", "prompt length in equal memory", "40x longer", "aot", _COMMAND, measured, longest),
    Claim("headline-batch", "batch in equal memory", "4.5x larger", "aot", _COMMAND, measured, largest),
)
