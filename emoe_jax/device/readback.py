"""What the outputs of a batch, once on the host, say of its sequences."""

import numpy as np
from jaxtyping import Bool

from emoe_jax.device.batch import Batch, Piece
from emoe_jax.device.sampler import Sampled, TokenLogprobs
from emoe_jax.requests.request import TokenLogprob
from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.plan import SampledToken


def not_finite(batch: Batch, finite: Bool[np.ndarray, " B"], prompt_logprobs: TokenLogprobs | None) -> set[Sequence]:
    """The sequences of a batch for which the model computed NaN or infinity."""
    spoilt = {piece.sequence for row, piece in enumerate(batch.pieces) if not finite[row]}
    if prompt_logprobs is not None:  # only in batches of one sequence
        piece = batch.pieces[0]
        count = min(piece.length, len(piece.sequence.prompt_token_ids) - 1 - piece.start)
        if not np.isfinite(prompt_logprobs.logprob[: max(0, count)]).all():
            spoilt.add(piece.sequence)
    return spoilt


def sampled_token(sequence: Sequence, sampled: Sampled, row: int) -> SampledToken:
    """The token of a row, with the log probabilities that its sequence asks for."""
    token, wanted = int(sampled.tokens[row]), sequence.params.logprobs
    if wanted is None:
        return SampledToken(token)
    return SampledToken(token, float(sampled.logprob[row]), _alternatives(sampled, row, wanted))


def keep_prompt_logprobs(piece: Piece, logprobs: TokenLogprobs) -> None:
    """Book what a prompt's chunk tells of the tokens after each of its own, once even if it is computed again."""
    sequence, known = piece.sequence, len(piece.sequence.prompt_logprobs)
    following = sequence.prompt_token_ids[piece.start + 1 : piece.start + 1 + piece.length]
    for row, token in enumerate(following):
        if piece.start + row == known:
            top = _alternatives(logprobs, row, sequence.params.prompt_logprobs or 0)
            sequence.prompt_logprobs.append(TokenLogprob(token, float(logprobs.logprob[row]), top))
            known += 1


def _alternatives(logprobs: Sampled | TokenLogprobs, row: int, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most probable tokens of a row, best first."""
    pairs = zip(logprobs.top_ids[row, :count], logprobs.top_logprobs[row, :count], strict=True)
    return tuple((int(token), float(logprob)) for token, logprob in pairs)
