"""Figure 10: how many prompts one set of experts may serve."""

from __future__ import annotations

from typing import Any

from benchmarks.paper.bench import ENGINE, SHARE, Bench, numbers_of
from benchmarks.paper.claim import Claim, Conclusion, Numbers
from benchmarks.quality.one_prompt import served_by_one
from benchmarks.quality.served import Cell
from benchmarks.quality.traffic import BURST

_TOLERANCE = 1.1
"""Perplexity that still counts as flat, as a multiple of that at the smallest p."""


def measured(bench: Bench) -> Numbers:
    """By p: `[mean, low, high]` of perplexity ratio and similarity, and the coverage, in the paper's way and as the
    engine does it."""
    periods = bench.sizes.periods

    def in_the_papers_way() -> Numbers:
        found = served_by_one(bench.model, periods, SHARE, bench.traffic(), bench.seed, bench.start)
        return {str(p): numbers_of(done) for p, done in found}

    sizes = {"periods": periods, "prompts": bench.sizes.prompts, "stretches": bench.sizes.stretches}
    paper = bench.kept("one-prompt", sizes, (*ENGINE, "benchmarks/quality"), in_the_papers_way)
    every = [p for p in periods if p > 0]
    cells = bench.cells(Cell("emoe-paper", "resident", SHARE, (("predict_every", p),)) for p in every)
    engine = {str(p): cell for p, cell in zip(every, cells, strict=True)}
    return {"paper's way": _curves(paper), "engine": _curves(engine)}


def _curves(cells: dict[str, Numbers]) -> Numbers:
    names = ("perplexity_ratio", "similarity")
    return {p: {name: of["means"][name] for name in names} | {"coverage": of["coverage"]} for p, of in cells.items()}


def conclude(numbers: Numbers) -> Conclusion:
    """Flat up to 40, higher from 60."""

    def told(curve: Numbers) -> str:
        return ", ".join(f"x{of['perplexity_ratio'][0]:.2f} at {p}" for p, of in curve.items())

    paper = numbers["paper's way"]
    ratios = {int(p): of["perplexity_ratio"][0] for p, of in paper.items()}
    first = ratios[min(ratios)]
    flat = [p for p, ratio in ratios.items() if p <= 40 and ratio <= _TOLERANCE * first]
    later = [ratio for p, ratio in ratios.items() if p >= 60]
    here = f"perplexity over all experts', one prompt's experts: {told(paper)}"
    here += (
        f"; predicted: {told(numbers['engine'])}; similarity {paper[min(paper, key=int)]['similarity'][0]:.0%} at p = "
    )
    here += f"{min(ratios)}, {paper[max(paper, key=int)]['similarity'][0]:.0%} at {max(ratios)}"
    is_flat = len(flat) == sum(p <= 40 for p in ratios)
    if is_flat and later and min(later) > _TOLERANCE * first:
        return Conclusion(here, "yes")
    if is_flat:
        return Conclusion(here, "partly", "it is flat, but does not rise later either")
    soonest = min(p for p, ratio in ratios.items() if ratio > _TOLERANCE * first)
    covered = {p: of["coverage"] for p, of in paper.items()}
    reason = (
        f"perplexity is higher from p = {soonest} on: the experts cover {covered[str(min(ratios))]:.0%} of the choices "
        f"at p = {min(ratios)}, and {covered[str(soonest)]:.0%} at {soonest}; topics "
        f"change every {BURST} prompts"
    )
    return Conclusion(here, "no", reason)


def plot(numbers: Numbers, figure: Any) -> None:
    """Perplexity on the left, similarity on the right."""
    for axis, name in zip(figure.subplots(1, 2), ("perplexity_ratio", "similarity"), strict=True):
        for label, curve in numbers.items():
            x = [int(p) for p in curve]
            mean, low, high = zip(*(of[name] for of in curve.values()), strict=True)
            axis.plot(x, mean, marker=".", label=label)
            axis.fill_between(x, low, high, alpha=0.15)
        axis.set(xlabel="p: prompts served by one set of experts", ylabel=name.replace("_", " "))
        axis.legend()


CLAIMS = (
    Claim(
        "fig10",
        "perplexity when the experts of one prompt serve the next p",
        "flat to p = 40, rises from 60",
        "live",
        "python -m benchmarks.quality --policies emoe-paper --shares 0.4",
        measured,
        conclude,
        plot,
    ),
)
