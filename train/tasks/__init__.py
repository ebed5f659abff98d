"""Data generators of the paper's five tasks, with held-out test splits.

>>> examples("clsfy", "test", seed=0, n=2)[0].answer in ("positive", "negative", "neutral")
True
"""

from __future__ import annotations

from collections.abc import Callable

from train.tasks import clsfy, comp, conv, facts, qa, sum
from train.tasks.example import Example, Split

GENERATORS: dict[str, Callable[[Split, str], Example]] = {
    "sum": sum.example,
    "clsfy": clsfy.example,
    "qa": qa.example,
    "comp": comp.example,
    "conv": conv.example,
}
TASKS = tuple(GENERATORS)
MORE = {"facts": facts.example}  # drawn like tasks and measured apart; to a server they are questions like others

__all__ = ["GENERATORS", "MORE", "TASKS", "Example", "Split", "examples"]


def examples(task: str, split: Split, seed: int, n: int) -> list[Example]:
    """The first `n` examples of a task, or of `facts`, and split under a seed.

    Raises ValueError for an unknown task or split.
    """
    generators = GENERATORS | MORE
    if task not in generators:
        raise ValueError(f"unknown task {task!r}; one of {', '.join(generators)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; train or test")
    return [generators[task](split, f"{seed}/{index}") for index in range(n)]
