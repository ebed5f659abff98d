"""What the runner and the memory plan both compile, and what tells the executables of memory splits apart."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emoe_jax.device import step
from emoe_jax.device.adjustments import Adjustments
from emoe_jax.device.batch import Buckets
from emoe_jax.device.executables import Executables
from emoe_jax.device.sampler import SamplingArrays


class MemoryShapes(NamedTuple):
    """What the shapes of slab and KV cache are: part of an executable's key."""

    capacities: tuple[int, ...]
    pages: tuple[int, ...]
    """By layer."""


def compile_adjusted_choice(
    executables: Executables, buckets: Buckets, B: int, V: int, sharding: jax.sharding.Sharding
) -> None:
    """The sampler for a batch in which a row has penalties, biases or a grammar."""
    logits = jax.ShapeDtypeStruct((B, V), jnp.float32, sharding=sharding)
    sampling = dataclasses.replace(SamplingArrays.of([], B), adjustments=Adjustments.none(B, V))
    last_tokens = jax.ShapeDtypeStruct(buckets.sequences[-1:], np.int32, sharding=sharding)
    places = np.zeros(B, np.int32)
    executables.compile(step.choose_tokens, (B, True), logits, sampling, np.asarray(False), last_tokens, places)
