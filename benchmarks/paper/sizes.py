"""How much is measured: all of it, or enough to see that every row can be made."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """Counts that the measurements go by."""

    prompts: int
    """Of each task, where answers are compared."""
    stretches: int
    """Of each kind of text."""
    draws: int
    """Sets of random experts."""
    shares: tuple[float, ...]
    """Of resident experts, where memory is traded for accuracy."""
    periods: tuple[int, ...]
    """Prompts that one prompt's experts serve."""
    misnamed: tuple[float, ...]
    """Shares of requests that name another task than their own."""
    traced: int
    """Prompts of each task whose routing is recorded."""
    network_steps: int
    """Optimizer steps of each network of Table 2."""
    sensitivity_prompts: int
    depths: int
    """Numbers of first layers that are made random."""
    requests: int
    """Of a run under load."""
    turns: int
    rates: tuple[float, ...]
    """Arrival rates, as shares of what the server with all experts can do."""
    batches: tuple[int, ...]
    """Sequences that are decoded together."""
    repeats: int
    steps: int
    """Of a measurement of speed: runs in turns, and tokens of each answer."""


FULL = Sizes(
    prompts=24,
    stretches=6,
    draws=2,
    shares=(0.8, 0.6, 0.4, 0.2),
    periods=(0, 1, 20, 40, 60, 80),
    misnamed=(0.0, 0.2, 0.5, 1.0),
    traced=200,
    network_steps=100,
    sensitivity_prompts=64,
    depths=8,
    requests=360,
    turns=6,
    rates=(0.7, 0.4, 0.9),
    batches=(1, 4, 16, 64),
    repeats=3,
    steps=32,
)
QUICK = Sizes(
    prompts=3,
    stretches=1,
    draws=1,
    shares=(0.4,),
    periods=(0, 1, 20),
    misnamed=(0.0, 1.0),
    traced=12,
    network_steps=4,
    sensitivity_prompts=4,
    depths=2,
    requests=24,
    turns=1,
    rates=(0.7,),
    batches=(1, 4),
    repeats=1,
    steps=8,
)
