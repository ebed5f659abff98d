"""From a batch's wishes to counts per sequence, and to rows of a routing trace."""

from collections.abc import Collection

import numpy as np
from jaxtyping import Float, Int, Shaped

from emoe_jax.device.batch import Batch
from emoe_jax.requests.sequence import Sequence
from emoe_jax.traces.recorder import TraceRecorder


def counts_by_sequence(batch: Batch, wishes: Shaped[np.ndarray, "M R k"], num_experts: int) -> Int[np.ndarray, "B M E"]:
    """How often each piece's sequence wished for each expert, by place."""
    M, E = len(wishes), num_experts
    places = np.concatenate([np.full(piece.length, place) for place, piece in enumerate(batch.pieces)])
    rows = np.concatenate(
        [np.arange(first, first + piece.length) for first, piece in zip(batch.first_rows, batch.pieces, strict=True)]
    )
    flat = ((places * M + np.arange(M)[:, None]) * E)[..., None] + wishes[:, rows]
    count = len(batch.pieces)
    return np.bincount(flat.reshape(-1), minlength=count * M * E).reshape(count, M, E)


def record_routing(
    recorder: TraceRecorder,
    batch: Batch,
    ranked: Shaped[np.ndarray, "M R ranks"],
    probs: Float[np.ndarray, "M R ranks"],
    left_out: Collection[Sequence] = (),
) -> None:
    """Record the tokens of sequences that have a `sample` number and have not ended, each once: what was preempted and
    computed again is in the trace already. Nothing of the sequences `left_out`.
    """
    rows: list[int] = []
    samples: list[int] = []
    positions: list[int] = []
    for first, piece in zip(batch.first_rows, batch.pieces, strict=True):
        sequence, start, length = piece.sequence, piece.start, piece.length
        skipped = max(0, sequence.num_recorded - start)
        if sequence.sample < 0 or sequence.finished or skipped >= length or sequence in left_out:
            continue
        rows += range(first + skipped, first + length)
        positions += range(start + skipped, start + length)
        samples += [sequence.sample] * (length - skipped)
        sequence.num_recorded = start + length
    if rows:
        experts, chances = (field[:, rows].swapaxes(0, 1) for field in (ranked, probs))
        recorder.add(samples, positions, experts, chances)
