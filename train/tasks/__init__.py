"""Data generators of the paper's five tasks, with held-out test splits.

>>> examples("clsfy", "test", seed=0, n=2)[0].answer in ("positive", "negative", "neutral")
True
"""

from __future__ import annotations

from collections.abc import Callable

from train.tasks import clsfy, comp, conv, qa, sum
from train.tasks.example import Example, Split

GENERATORS: dict[str, Callable[[Split, str], Example]] = {
    "sum": sum.example,
    "clsfy": clsfy.example,
    "qa": qa.example,
    "comp": comp.example,
    "conv": conv.example,
}
TASKS = tuple(GENERATORS)

__all__ = ["GENERATORS", "TASKS", "Example", "Split", "examples"]


def examples(task: str, split: Split, seed: int, n: int) -> list[Example]:
    """The first `n` examples of a task and split under a seed. Raises ValueError for an unknown task or split."""
    if task not in GENERATORS:
        raise ValueError(f"unknown task {task!r}; one of {', '.join(TASKS)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; train or test")
    return [GENERATORS[task](split, f"{seed}/{index}") for index in range(n)]
