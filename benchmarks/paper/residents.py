"""Figures 14 and 15, and the headline on memory: memory and accuracy by how many experts are resident."""

from __future__ import annotations

from typing import Any

from benchmarks.memory.needs import Needs, Workload
from benchmarks.paper.bench import Bench
from benchmarks.paper.claim import Claim, Conclusion, Numbers
from benchmarks.quality.served import Cell
from emoe_jax.models import config_from_directory

_COMMAND = "python -m benchmarks.quality --policies emoe emoe-paper random static-global"
_LOAD = Workload(prompt_length=512, batch=4, output_tokens=0)

POLICIES: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    "emoe": ("emoe", ()),
    "eMoE-A = eMoE-L (p = 40)": ("emoe-paper", (("predict_every", 40),)),
    "eMoE-E (p = 1)": ("emoe-paper", (("predict_every", 1),)),
    "static-global": ("static-global", ()),
    "random": ("random", ()),
}
"""What stands behind each name. Before a prompt the shipped predictor has no network, so A and L predict alike."""


def cell_of(name: str, share: float) -> Cell:
    """The cell of a policy at a share."""
    policy, options = POLICIES[name]
    return Cell(policy, "resident", share, options)


def measured(bench: Bench) -> Numbers:
    """Similarity by policy and share, and what of the memory is saved."""
    shares = bench.sizes.shares
    cells = bench.cells(cell_of(name, share) for name in POLICIES for share in shares)
    means = iter(cell["means"] for cell in cells)
    found = {name: {f"{share:g}": next(means) for share in shares} for name in POLICIES}
    similarity = {name: {share: of["similarity"] for share, of in curve.items()} for name, curve in found.items()}
    config = config_from_directory(bench.model)
    full = Needs.of(config, 1.0, "bfloat16")
    memory = {}
    for share in shares:
        needs = Needs.of(config, share, "bfloat16")
        memory[f"{share:g}"] = {
            "experts_saved": 1 - needs.slab / full.slab,
            "device_saved": 1 - needs.memory(_LOAD) / full.memory(_LOAD),
        }
    substituted = {share: of["substituted"][0] for share, of in found["emoe"].items()}
    return {"similarity": similarity, "substituted": substituted, "memory": memory}


def accuracy(numbers: Numbers) -> Conclusion:
    """99.6 % alike at 80 %, 98.2 % at 60 %."""
    ours = numbers["similarity"]["emoe"]
    here = "emoe: " + ", ".join(f"{of[0]:.1%} at {float(share):.0%}" for share, of in ours.items())
    if all(of[0] >= 0.93 for of in ours.values()):
        return Conclusion(here, "yes")
    kept = [share for share, of in ours.items() if of[0] >= 0.93]
    most = max(ours, key=float)
    reason = (
        f"with {float(most):.0%} of the experts resident, {numbers['substituted'][most]:.0%} of the routers' choices "
        "are substituted already"
    )
    return Conclusion(here, "partly" if kept else "no", reason)


def rivals(numbers: Numbers) -> Conclusion:
    """Random experts lose 4.1 to 8.6 points; predicting at every prompt gains 0.1 to 0.4."""
    share = min(numbers["similarity"]["emoe"], key=lambda text: abs(float(text) - 0.6))
    at = {name: curve[share] for name, curve in numbers["similarity"].items()}
    ours, paper, every, random = (at[name] for name in ("emoe", "eMoE-A = eMoE-L (p = 40)", "eMoE-E (p = 1)", "random"))
    here = (
        f"at {float(share):.0%}: emoe {ours[0]:.1%}, eMoE-A and -L {paper[0]:.1%}, eMoE-E {every[0]:.1%}, "
        f"static-global {at['static-global'][0]:.1%}, random {random[0]:.1%}"
    )
    statements = {
        "random is clearly below emoe": random[2] < ours[1],
        "eMoE-E is above eMoE-A and -L": every[0] > paper[0],
    }
    failed = [text for text, holds in statements.items() if not holds]
    if not failed:
        return Conclusion(here, "yes")
    reason = f"not here: {'; '.join(failed)} ({100 * (ours[0] - random[0]):.1f} points between emoe and random)"
    return Conclusion(here, "partly" if len(failed) < len(statements) else "no", reason)


def headline(numbers: Numbers) -> Conclusion:
    """80 % less memory, at what similarity."""
    memory = numbers["memory"]
    share = min(memory, key=float)
    saved, similarity = memory[share]["experts_saved"], numbers["similarity"]["emoe"][share]
    here = (
        f"{saved:.0%} less expert memory, {memory[share]['device_saved']:.0%} less of the device, at "
        f"{similarity[0]:.1%} similarity ({similarity[1]:.1%} to {similarity[2]:.1%})"
    )
    if saved >= 0.8 and similarity[0] >= 0.93:
        return Conclusion(here, "yes")
    reason = (
        "the memory is saved, but answers change" if saved >= 0.8 else "fewer experts were left out than in the paper"
    )
    return Conclusion(here, "partly" if saved >= 0.8 or similarity[0] >= 0.93 else "no", reason)


def plot(numbers: Numbers, figure: Any) -> None:
    """Similarity by share, a curve of each policy."""
    axis = figure.subplots()
    for name, curve in numbers["similarity"].items():
        shares = sorted(curve, key=float)
        mean, low, high = zip(*(curve[share] for share in shares), strict=True)
        x = [100 * float(share) for share in shares]
        axis.plot(x, mean, marker=".", label=name)
        axis.fill_between(x, low, high, alpha=0.12)
    axis.set(xlabel="experts resident, %", ylabel="similarity to all experts resident", ylim=(0, 1))
    axis.legend()


def plot_memory(numbers: Numbers, figure: Any) -> None:
    """Memory that is saved, by share."""
    axis = figure.subplots()
    shares = sorted(numbers["memory"], key=float)
    for key, label in (("experts_saved", "expert memory"), ("device_saved", "weights, experts and KV cache")):
        axis.plot(
            [100 * float(share) for share in shares],
            [100 * numbers["memory"][share][key] for share in shares],
            marker=".",
            label=label,
        )
    axis.set(xlabel="experts resident, %", ylabel="saved, %", ylim=(0, 100))
    axis.legend()


CLAIMS = (
    Claim(
        "fig14",
        "accuracy by experts resident",
        "93.7 to 99.8 % at 20 to 80 % less memory; 99.6 to 99.7 % at 80 %, 98.2 to 98.8 % at 60 %",
        "live",
        _COMMAND,
        measured,
        accuracy,
        plot,
    ),
    Claim(
        "fig15",
        "the same against random experts and against predicting at every prompt",
        "random loses 4.1 to 8.6 points; eMoE-E gains 0.1 to 0.4 over A and L",
        "live",
        _COMMAND,
        measured,
        rivals,
        plot_memory,
    ),
    Claim("headline-memory", "memory", "up to 80 % less, at equal accuracy", "live", _COMMAND, measured, headline),
)
