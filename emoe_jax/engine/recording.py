"""From a batch's wishes to rows of a routing trace."""

import numpy as np

from emoe_jax.engine.batch import Batch
from emoe_jax.engine.step import Wishes
from emoe_jax.traces.recorder import TraceRecorder


def record_wishes(recorder: TraceRecorder, batch: Batch, wishes: Wishes | list[Wishes]) -> None:
    """Record the tokens of sequences that have a `sample` number, each once: what was preempted and computed again
    is in the trace already.
    """
    rows: list[int] = []
    samples: list[int] = []
    positions: list[int] = []
    for index, (sequence, start, length, _) in enumerate(batch.pieces):
        skipped = max(0, sequence.num_recorded - start)
        if sequence.sample < 0 or skipped >= length:
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
