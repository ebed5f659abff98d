"""What crosses the boundary between scheduler and runner: a step's work, and what came of it."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from emoe_jax.requests.sequence import Sequence


class PrefillChunk(NamedTuple):
    """Positions `start .. start + length - 1` of a sequence; the last chunk samples the next token."""

    sequence: Sequence
    start: int
    length: int
    is_last: bool


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step's work, planned at time `now` (seconds). A sequence appears once; its pages cover what is written."""

    decodes: tuple[Sequence, ...] = ()
    prefills: tuple[PrefillChunk, ...] = ()
    now: float = 0.0

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All sequences that the step advances."""
        return (*self.decodes, *(chunk.sequence for chunk in self.prefills))

    @property
    def needs_tokens(self) -> bool:
        """Whether the host must read a sequence's token before it can say how to choose the next one."""
        adjustments = (sequence.adjustment for sequence in self.sequences)
        return any(adjustment is not None and adjustment.needs_tokens for adjustment in adjustments)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of all prefill chunks, padding not counted."""
        return sum(chunk.length for chunk in self.prefills)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes: one for each decode, and those of the prefill chunks."""
        return len(self.decodes) + self.num_prefill_tokens

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)


class SampledToken(NamedTuple):
    """A token, its log probability under the raw distribution and the best alternatives (empty when not asked)."""

    token_id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What the runner brings back: a token for every decode and every last prefill chunk of the plan, but for the
    sequences in `not_finite`.
    """

    sampled: Mapping[Sequence, SampledToken]
    not_finite: frozenset[Sequence] = dataclasses.field(default=frozenset(), kw_only=True)
    """Sequences for which the model computed NaN or infinity: no token can be chosen, and their pages are spoilt."""
