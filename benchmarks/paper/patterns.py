"""Figures 3, 7, 8 and 9: patterns in routing, between layers and between prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures.__main__ import DISTANCES, measure
from benchmarks.paper.bench import ENGINE, Bench
from benchmarks.paper.claim import Agrees, Claim, Conclusion, Numbers
from emoe_jax.traces import RoutingTrace

_COMMAND = "python -m benchmarks.figures --trace FILE"
_SHARES = (0.25, 0.5, 0.75)


def measured(bench: Bench) -> Numbers:
    """The figures' numbers of each trace, by the name of its model."""

    def of(path: Path) -> Numbers:
        return measure(RoutingTrace.load(path), None, _SHARES, max(DISTANCES), bench.seed)

    code = (*ENGINE, "benchmarks/figures")
    return {
        name: bench.kept(f"figures-{name}", {"trace": path.name}, code, lambda path=path: of(path))
        for name, path in bench.traces.items()
    }


def transitions(numbers: Numbers) -> Conclusion:
    """How much likelier an expert's favourite follower is than the most popular expert of the next layer."""
    lifts = {}
    for name, of in numbers.items():
        tables = [np.asarray(table) for table in of["transitions"].values()]
        favourite = np.mean([table.max(1).mean() for table in tables])
        popular = np.mean([table.mean(0).max() for table in tables])
        lifts[name] = (favourite, popular)
    told = "; ".join(
        f"{name}: the likeliest next expert follows in {favourite:.0%} of tokens, the most popular one in {popular:.0%}"
        for name, (favourite, popular) in lifts.items()
    )
    strong = [favourite >= 1.5 * popular for favourite, popular in lifts.values()]
    if all(strong):
        return Conclusion(told, "yes")
    weak = ", ".join(name for name, holds in zip(lifts, strong, strict=True) if not holds)
    return Conclusion(
        told,
        "partly" if any(strong) else "no",
        f"in {weak} the likeliest follower is not half as likely again as the most popular expert",
    )


def layers(numbers: Numbers) -> Conclusion:
    """Consecutive layers."""
    found = {name: of["between_layers"] for name, of in numbers.items()}
    told = "; ".join(f"{name}: {of['mean']:.2f} ({of['by_chance']:.2f} by chance)" for name, of in found.items())
    means = [of["mean"] for of in found.values()]
    if all(0.4 <= mean <= 0.6 for mean in means):
        return Conclusion(told, "yes")
    beyond = all(of["mean"] >= of["by_chance"] + 0.05 for of in found.values())
    reason = (
        "layers are correlated, but less than the paper's; it does not say which correlation it took"
        if beyond and max(means) < 0.6
        else "the correlation is another than the paper's; it does not say which one it took"
    )
    return Conclusion(told, "partly" if beyond else "no", reason)


def prompts(numbers: Numbers) -> Conclusion:
    """Consecutive prompts: in the paper's range, but is it recurrence?"""
    return _recurrence(
        {
            name: (
                of["consecutive"]["mean"],
                of["consecutive"]["mean"],
                of["any_pair"],
                of["consecutive"]["beyond_mean"],
            )
            for name, of in ((name, of["between_prompts"]) for name, of in numbers.items())
        },
        (0.4, 0.95),
    )


def distances(numbers: Numbers) -> Conclusion:
    """A prompt and its i-th next."""
    found = {}
    for name, of in ((name, of["between_prompts"]) for name, of in numbers.items()):
        known = [value for value in of["by_distance"].values() if value is not None]
        beyond = [value for value in of["beyond_mean_by_distance"].values() if value is not None]
        found[name] = (min(known), max(known), of["any_pair"], float(np.mean(beyond)))
    return _recurrence(found, (0.45, 0.6))


def _recurrence(found: dict[str, tuple[float, float, float, float]], range_: tuple[float, float]) -> Conclusion:
    """By model: lowest and highest correlation, that of any two prompts, and what is left without the mean prompt."""
    told = "; ".join(
        f"{name}: {low:.2f}{'' if low == high else f' to {high:.2f}'} (any two prompts {any_pair:.2f}, "
        f"beyond the mean of all prompts {beyond:.2f})"
        for name, (low, high, any_pair, beyond) in found.items()
    )
    inside = [range_[0] <= low and high <= range_[1] for low, high, _, _ in found.values()]
    popular = all(any_pair >= 0.8 * high for _, high, any_pair, _ in found.values())
    agrees: Agrees = "yes" if all(inside) else "partly" if any(inside) else "no"
    if agrees == "yes" and not popular:
        return Conclusion(told, "yes")
    reason = "most of it is popularity: any two prompts are nearly as alike" if popular else ""
    if agrees != "yes":
        outside = ", ".join(name for name, holds in zip(found, inside, strict=True) if not holds)
        reason = f"{outside} lies outside the paper's range" + (f"; {reason}" if reason else "")
    return Conclusion(told, "partly" if agrees == "yes" else agrees, reason)


def plot_transitions(numbers: Numbers, figure: Any) -> None:
    """One heat map of each model."""
    axes = figure.subplots(1, len(numbers), squeeze=False)[0]
    for axis, (name, of) in zip(axes, numbers.items(), strict=True):
        layer, table = next(iter(of["transitions"].items()))
        image = axis.imshow(table, cmap="viridis", interpolation="nearest")
        axis.set_title(name)
        axis.set_xlabel(f"expert of MoE layer {int(layer) + 1}")
        axis.set_ylabel(f"expert of MoE layer {layer}")
        figure.colorbar(image, ax=axis)


def plot_layers(numbers: Numbers, figure: Any) -> None:
    """Correlation by layer."""
    axis = figure.subplots()
    for name, of in numbers.items():
        values = [np.nan if value is None else value for value in of["between_layers"]["by_layer"]]
        (line,) = axis.plot(values, marker=".", label=name)
        axis.axhline(of["between_layers"]["by_chance"], color=line.get_color(), linestyle=":")
    axis.set(xlabel="from this MoE layer to the next (dotted: by chance)", ylabel="correlation", ylim=(0, 1))
    axis.legend()


def plot_prompts(numbers: Numbers, figure: Any) -> None:
    """Correlation of consecutive prompts by layer."""
    axis = figure.subplots()
    for name, of in numbers.items():
        found = of["between_prompts"]
        values = [np.nan if value is None else value for value in found["consecutive"]["by_layer"]]
        (line,) = axis.plot(values, marker=".", label=name)
        axis.axhline(found["any_pair"], color=line.get_color(), linestyle=":")
    axis.set(xlabel="MoE layer (dotted: any two prompts)", ylabel="correlation", ylim=(0, 1))
    axis.legend()


def plot_distances(numbers: Numbers, figure: Any) -> None:
    """Correlation by distance, with and without the mean prompt."""
    axis = figure.subplots()
    for name, of in numbers.items():
        found = of["between_prompts"]
        for values, style, label in (
            (found["by_distance"], "-", name),
            (found["beyond_mean_by_distance"], "--", f"{name}, beyond the mean of all prompts"),
        ):
            axis.plot(
                [int(i) for i in values], [np.nan if v is None else v for v in values.values()], style, label=label
            )
    axis.set(xlabel="i: prompts between", ylabel="correlation with the i-th next prompt", ylim=(-0.1, 1))
    axis.legend()


CLAIMS = (
    Claim(
        "fig3",
        "experts of consecutive layers follow each other in patterns",
        "strong, consistent patterns",
        "replay",
        _COMMAND,
        measured,
        transitions,
        plot_transitions,
    ),
    Claim(
        "fig7",
        "correlation of experts in consecutive layers",
        "about 0.50",
        "replay",
        _COMMAND,
        measured,
        layers,
        plot_layers,
    ),
    Claim(
        "fig8",
        "correlation of consecutive prompts' experts",
        "0.4 to 0.6 (OpenMoE), 0.75 to 0.95 (Mixtral)",
        "replay",
        _COMMAND,
        measured,
        prompts,
        plot_prompts,
    ),
    Claim(
        "fig9",
        "correlation with the i-th next prompt, i to 20",
        "0.48 to 0.55",
        "replay",
        _COMMAND,
        measured,
        distances,
        plot_distances,
    ),
)
