"""Tells the trace recorder and the planner of residency of each request that came."""

from collections.abc import Sequence as Rows

import numpy as np

from emoe_jax.device.runner import Runner
from emoe_jax.requests.sequence import Sequence
from emoe_jax.residency.foresight import Foresight


def announce(sequences: Rows[Sequence], runner: Runner, foresight: Foresight) -> None:
    """Tell recorder and planner of a request that came. Only a recorder makes the engine wait for its embedding."""
    recorder = runner.recorder
    token_ids, embedding = sequences[0].prompt_token_ids, None
    if recorder is not None or foresight.wants_embeddings:
        embedding = runner.mean_embedding(token_ids)
    foresight.arrived(sequences[0], embedding)
    if recorder is not None:
        known = None if embedding is None else np.asarray(embedding)
        if known is not None and not np.isfinite(known).all():
            known = None
        for sequence in sequences:
            sequence.sample = recorder.begin(sequence.task, len(token_ids), known, token_ids)
