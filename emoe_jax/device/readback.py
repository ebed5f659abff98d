"""What the outputs of a batch, once on the host, say of its sequences."""

from collections.abc import Sequence as Rows

import numpy as np
from jaxtyping import Bool, Float

from emoe_jax.device.batch import Batch
from emoe_jax.device.sampler import TokenLogprobs
from emoe_jax.device.step import Comparison
from emoe_jax.requests.request import TokenLogprob
from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.plan import SampledToken


def not_finite(batch: Batch, finite: Bool[np.ndarray, " B"], prompt_logprobs: TokenLogprobs | None) -> set[Sequence]:
    """The sequences of a batch for which the model computed NaN or infinity."""
    spoilt = {piece.sequence for place, piece in enumerate(batch.pieces) if not finite[place]}
    if prompt_logprobs is not None:
        first = 0
        for piece in batch.pieces:
            after = first + len(batch.following(piece))
            if not np.isfinite(prompt_logprobs.logprob[first:after]).all():
                spoilt.add(piece.sequence)
            first = after
    return spoilt


def sampled_token(sequence: Sequence, token: int, logprobs: TokenLogprobs | None, place: int) -> SampledToken:
    """A token, with the log probabilities that its sequence asks for."""
    wanted = sequence.params.logprobs
    if wanted is None or logprobs is None:
        return SampledToken(token)
    return SampledToken(token, float(logprobs.logprob[place]), _alternatives(logprobs, place, wanted))


def keep_prompt_logprobs(batch: Batch, place: int, logprobs: TokenLogprobs) -> None:
    """Book what a prompt's chunk tells of the tokens after each of its own, once even if it is computed again.

    `logprobs` are of the rows of `Batch.prompt_targets`.
    """
    piece, first = batch.pieces[place], sum(len(batch.following(before)) for before in batch.pieces[:place])
    sequence, known = piece.sequence, len(piece.sequence.prompt_logprobs)
    for offset, token in enumerate(batch.following(piece)):
        if piece.start + offset == known:
            top = _alternatives(logprobs, first + offset, sequence.params.prompt_logprobs or 0)
            sequence.prompt_logprobs.append(TokenLogprob(token, float(logprobs.logprob[first + offset]), top))
            known += 1


def keep_for_audits(batch: Batch, kept: Rows[Float[np.ndarray, "1 V"]], comparison: Comparison | None) -> None:
    """Give sequences the logits that are kept of their answers, and an audited text what was found of it."""
    for place, logits in zip(batch.kept_places, kept, strict=True):
        piece = batch.pieces[place]
        if piece.sequence.served is not None and not piece.sequence.finished:
            piece.sequence.served.keep(piece.token, piece.start + piece.length - 1, logits[0])
    if comparison is not None and batch.audited_rows is not None:
        batch.audited_rows.served.compared(batch.audited_rows.positions, comparison.kl, comparison.agrees)


def _alternatives(logprobs: TokenLogprobs, row: int, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most probable tokens of a row, best first."""
    pairs = zip(logprobs.top_ids[row, :count], logprobs.top_logprobs[row, :count], strict=True)
    return tuple((int(token), float(logprob)) for token, logprob in pairs)
