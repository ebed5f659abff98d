"""What the runner and the memory plan both compile, and what tells the executables of memory splits apart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emoe_jax.device import step
from emoe_jax.device.adjustments import TokenEdits, all_allowed, usual_rooms
from emoe_jax.device.executables import Executables
from emoe_jax.device.sampler import FILTERS, SamplingArrays
from emoe_jax.device.shapes import Buckets
from emoe_jax.requests.served import MOST_AUDITED


class MemoryShapes(NamedTuple):
    """What the shapes of slab and KV cache are: part of an executable's key."""

    capacities: tuple[int, ...]
    pages: tuple[int, ...]
    """By layer."""


def bytes_beside(buckets: Buckets, V: int) -> int:
    """What stays on the device beside the arguments of a step: block tables, and rows of logits that two steps keep for
    audits until the host has them.
    """
    return buckets.table_bytes + 2 * 4 * V * min(buckets.sequences[-1], MOST_AUDITED)


def compile_choices(
    executables: Executables, buckets: Buckets, B: int, V: int, sharding: jax.sharding.Sharding
) -> None:
    """All that may follow a forward of `B` places: changed logits, filters, the choice of tokens, log probabilities."""
    logits = jax.ShapeDtypeStruct((B, V), jnp.float32, sharding=sharding)
    tokens = jax.ShapeDtypeStruct((B,), np.int32, sharding=sharding)
    last_tokens = jax.ShapeDtypeStruct((buckets.token_places,), np.int32, sharding=sharding)
    for room in usual_rooms(B * V):
        edits, _ = TokenEdits.empty(B, room)
        executables.compile(step.edit_logits, (B, room), logits, edits, room=room)
    executables.compile(step.mask_logits, B, logits, all_allowed(B, V))
    executables.compile(step.chosen_logprobs, B, logits, tokens)
    executables.compile(step.take_rows, logits.shape[:-1], logits, np.zeros(1, np.int32))
    sampling, places = SamplingArrays.pack([], B), np.zeros(B, np.int32)
    for by in FILTERS:
        executables.compile(step.filter_logits, (B, by), logits, sampling, by=by)
    for random in (False, True):
        arguments = (logits, sampling, places, last_tokens)
        executables.compile(step.choose_tokens, (B, random), *arguments, random=random)
