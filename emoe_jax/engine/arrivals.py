"""Tells the trace recorder and the planner of residency of each request that came."""

from collections.abc import Sequence as Rows

import numpy as np
from jaxtyping import Float

from emoe_jax.device.runner import Runner
from emoe_jax.requests.sequence import Sequence
from emoe_jax.residency.foresight import Foresight

ROWS_AT_ONCE = 4096


def announce(sequences: Rows[Sequence], runner: Runner, foresight: Foresight) -> None:
    """Tell recorder and planner of a request that came."""
    recorder = runner.recorder
    token_ids, embedding = sequences[0].prompt_token_ids, None
    if recorder is not None or foresight.wants_embeddings:
        embedding = mean_row(runner.embedding_table(), token_ids)
        if not np.isfinite(embedding).all():
            embedding = None  # the predictor remembers those of earlier prompts
    foresight.arrived(sequences[0], embedding)
    if recorder is not None:
        for sequence in sequences:
            sequence.sample = recorder.begin(sequence.task, len(token_ids), embedding, token_ids)


def mean_row(table: Float[np.ndarray, "V D"], token_ids: Rows[int]) -> Float[np.ndarray, " D"]:
    """The mean of a table's rows, each distinct one read once and few at a time, in float32."""
    tokens, counts = np.unique(np.asarray(token_ids, np.int64), return_counts=True)
    total = np.zeros(table.shape[1], np.float32)
    for start in range(0, len(tokens), ROWS_AT_ONCE):
        rows = table[tokens[start : start + ROWS_AT_ONCE]].astype(np.float32)
        total += counts[start : start + ROWS_AT_ONCE].astype(np.float32) @ rows
    return total / np.float32(len(token_ids))
