"""From a batch's wishes to counts per sequence, and to rows of a routing trace."""

from collections.abc import Collection

import numpy as np
from jaxtyping import Int

from emoe_jax.device.batch import Batch
from emoe_jax.device.step import Wishes
from emoe_jax.requests.sequence import Sequence
from emoe_jax.traces.recorder import TraceRecorder

AnyWishes = Wishes | list[Wishes]
"""Of all MoE layers, or a list by layer."""


def without_probs(wishes: AnyWishes) -> AnyWishes:
    """The choices alone, where the recorder does not ask how probable they were."""
    if isinstance(wishes, Wishes):
        return Wishes(wishes.experts, None)
    return [Wishes(layer.experts, None) for layer in wishes]


def counts_by_sequence(batch: Batch, wishes: AnyWishes, num_experts: int) -> Int[np.ndarray, "B M E"]:
    """How often each sequence of a batch wished for each expert."""
    experts = wishes.experts if isinstance(wishes, Wishes) else np.stack([layer.experts for layer in wishes])
    (B, T, _), (M, _, k), E = batch.shape, experts.shape, num_experts
    first = (np.arange(B)[:, None, None] * M + np.arange(M)[:, None]) * E  # [B, M, 1]
    flat = first[..., None] + experts.reshape(M, B, T, k).swapaxes(0, 1).reshape(B, M, T, k)
    used = np.arange(T) < batch.inputs.lengths[:, None]  # [B, T]
    used = np.broadcast_to(used[:, None, :, None], flat.shape)
    return np.bincount(flat[used], minlength=B * M * E).reshape(B, M, E)


def record_wishes(
    recorder: TraceRecorder, batch: Batch, wishes: AnyWishes, left_out: Collection[Sequence] = ()
) -> None:
    """Record the tokens of sequences that have a `sample` number and have not ended, each once: what was preempted and
    computed again is in the trace already. Nothing of the sequences `left_out`.
    """
    rows: list[int] = []
    samples: list[int] = []
    positions: list[int] = []
    for index, (sequence, start, length, _) in enumerate(batch.pieces):
        skipped = max(0, sequence.num_recorded - start)
        if sequence.sample < 0 or sequence.finished or skipped >= length or sequence in left_out:
            continue
        first = index * batch.shape.tokens
        rows += range(first + skipped, first + length)
        positions += range(start + skipped, start + length)
        samples += [sequence.sample] * (length - skipped)
        sequence.num_recorded = start + length
    if not rows:
        return
    if isinstance(wishes, Wishes):
        experts, probs = (np.asarray(field)[:, rows].swapaxes(0, 1) for field in wishes)
    else:
        experts, probs = (
            np.stack([field[rows] for field in by_layer], axis=1) for by_layer in zip(*wishes, strict=True)
        )
    recorder.add(samples, positions, experts, probs)
