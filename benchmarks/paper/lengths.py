"""Figure 4: how long answers are, by task."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.paper.bench import Bench
from benchmarks.paper.claim import Claim, Conclusion, Numbers
from emoe_jax.traces import RoutingTrace
from train.tasks import TASKS


def measured(bench: Bench) -> Numbers:
    """Answer tokens of each prompt of the demo's trace, by task, ascending."""
    trace = RoutingTrace.load(bench.trace())
    assert trace.prompt_length is not None
    answers = np.bincount(trace.sample, minlength=trace.num_prompts) - trace.prompt_length
    tasks = np.asarray(trace.tasks)
    return {task: sorted(answers[tasks == task].tolist()) for task in TASKS}


def conclude(numbers: Numbers) -> Conclusion:
    """Which task answers shortest and longest, and how far their 90th percentiles are apart."""
    median = {task: float(np.median(lengths)) for task, lengths in numbers.items()}
    p90 = {task: float(np.quantile(lengths, 0.9)) for task, lengths in numbers.items()}
    told = ", ".join(f"{task.upper()} {p90[task]:.0f}" for task in sorted(p90, key=lambda task: p90[task]))
    shortest, longest = min(median, key=lambda task: median[task]), max(median, key=lambda task: median[task])
    ratio = max(p90.values()) / max(1.0, min(p90.values()))
    here = f"p90 of tokens: {told}; {ratio:.0f}x apart"
    if shortest == "qa" and longest == "conv" and ratio <= 3:
        return Conclusion(here, "yes")
    reasons = []
    if shortest != "qa":
        reasons.append(f"{shortest.upper()} answers with a label, which is shorter than QA's span")
    if longest != "conv":
        reasons.append(f"{longest.upper()} is the longest")
    if ratio > 3:
        reasons.append("tasks differ by more than in the paper, whose models answer all of them in sentences")
    return Conclusion(here, "partly" if longest == "conv" else "no", "; ".join(reasons))


def plot(numbers: Numbers, figure: Any) -> None:
    """The cumulative distribution of each task."""
    axis = figure.subplots()
    for task, lengths in numbers.items():
        axis.step(lengths, np.arange(1, len(lengths) + 1) / len(lengths), where="post", label=task.upper())
    axis.set(xlabel="answer tokens", ylabel="share of answers", ylim=(0, 1))
    axis.legend()


CLAIMS = (
    Claim(
        "fig4",
        "output lengths differ between tasks",
        "QA shortest, conversation longest; p90 differs up to 2x",
        "live",
        "python -m train.traces --out trace.npz --json lengths.json",
        measured,
        conclude,
        plot,
    ),
)
