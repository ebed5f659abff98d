"""Requests that name another task than their own."""

import random
from collections.abc import Sequence


def misnamed(tasks: Sequence[str], share: float, seed: int) -> list[str]:
    """The tasks that requests name: with a chance of `share` another one of these than their own.

    With one seed, larger shares misname all requests that smaller ones do. Where all are of one task, all keep it.
    """
    rng = random.Random(seed)
    known = sorted(set(tasks))
    named = []
    for task in tasks:
        others = [other for other in known if other != task]
        chance, other = rng.random(), rng.choice(others or [task])
        named.append(other if chance < share else task)
    return named
