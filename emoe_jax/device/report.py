"""What the host reads of a step, in one buffer."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Shaped

from emoe_jax.config import ModelConfig
from emoe_jax.device.packing import Packing
from emoe_jax.device.shapes import Shape
from emoe_jax.traces.parts import expert_dtype


class Report(NamedTuple):
    """The outcome of a flat batch, on the device or read by the host. Rows and places are those of its `Shape`."""

    tokens: Int32[Any, " B"]
    """The most probable next token of each sequence."""
    substituted_choices: Int32[Any, " B"]
    """How many wishes of each sequence's new tokens other experts stood in for, summed over layers."""
    substituted_weight: Float[Any, " B"]
    """The same by router probability, a token in one layer counting 1."""
    wish_counts: Int[Any, "M E"]
    """How often the routers wished for each expert, without substitution and without padding."""
    needed: Bool[Any, "M E"]
    """Which experts some row may not be without. The step is void from the first layer on where one was absent."""
    ranked: Shaped[Any, "M R ranks"]
    """The routers' unfiltered choices and, for traces, those that rank next, best first, in the dtype of a routing
    trace; of padding rows, too."""
    finite: Bool[Any, " B"]
    """Whether the last hidden states of each sequence's new tokens, and its logits, are finite."""

    @staticmethod
    def packing(shape: Shape, config: ModelConfig) -> Packing:
        """How the outcome lies in one buffer."""
        return _packing(shape, len(config.moe_layers), config.num_experts, config.ranks)

    @classmethod
    def read(cls, words: Int32[np.ndarray, " words"], shape: Shape, config: ModelConfig) -> Report:
        """The outcome in a buffer that has come to the host."""
        return cls(**cls.packing(shape, config).views(words))


@functools.cache
def _packing(shape: Shape, layers: int, experts: int, ranks: int) -> Packing:
    places = (shape.sequences,)
    return Packing(
        tokens=(places, np.int32),
        substituted_choices=(places, np.int32),
        substituted_weight=(places, np.float32),
        wish_counts=((layers, experts), np.int32),
        needed=((layers, experts), np.bool_),
        ranked=((layers, shape.rows, ranks), expert_dtype(experts)),
        finite=(places, np.bool_),
    )
