"""One completion in flight. A request with `n > 1` is `n` sequences that share an id."""

import dataclasses
import enum

import numpy as np
from jaxtyping import Int

from emoe_jax.requests.adjustment import LogitAdjustment
from emoe_jax.requests.contract import NOTHING, Allowance, RoutingContract, allowance_of
from emoe_jax.requests.request import SLO, FinishReason, SamplingParams, TokenLogprob
from emoe_jax.requests.served import ServedLogits


class SequenceStatus(enum.Enum):
    """A preempted sequence is waiting again. Finished is final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


def substituted_share(weight: float, assigned: int, top_k: int) -> float:
    """The share of router weight that was substituted, of so many choices. A token has a weight of 1 in each layer."""
    return weight * top_k / assigned if assigned else 0.0


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """State of one completion, mutated by the scheduler only (the counters: by the step's owner).

    Positions `0 .. num_computed - 1` have their keys and values in `pages`, once dispatched steps have run. A sequence
    whose only position left is its newest token decodes; one with more left is prefilling, its own tokens included
    after a preemption.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    index: int = 0
    routing: RoutingContract = "resident"
    bounded: Allowance = NOTHING
    """What may be substituted where `routing` is `bounded`."""
    tuned: bool = False
    """Whether that is the engine's choice, by what audits find."""
    task: str | None = None
    slo: SLO = dataclasses.field(default_factory=SLO)
    cache_salt: str | None = None
    """The sequence reuses only what was computed under this salt; None is one, too."""
    arrival: float = 0.0
    """When it came, in seconds on the engine's clock: its deadlines count from here."""
    queued_at: float = 0.0
    """When the engine took it, which may be later: a server tokenizes and queues. 0 where that is when it came."""
    seed: int = 0
    """What the sampler uses: the request's seed, or a number that the engine drew."""
    adjustment: LogitAdjustment | None = None
    """Penalties and biases, for requests that have any."""

    generated: list[int] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    num_pending: int = 0
    """Tokens that dispatched steps sample for it and that the host has not read: at most two, for a moment."""
    num_computed: int = 0
    """Of dispatched steps, read or not."""
    num_cached: int = 0
    """Its first tokens that were computed for earlier sequences: until it starts those known when it came, then those
    whose pages it took over."""
    page_keys: list[bytes] = dataclasses.field(default_factory=list)
    """The keys under which its full pages are published, as far as they were computed."""
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    order: int = -1
    """Rank of arrival among all sequences of the scheduler; it decides which one is preempted."""
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    """Of the prompt's tokens from the second on, as far as they have been computed. Empty unless the request asks."""
    expected_tokens: float = 0.0
    """How many tokens the answer was expected to have when the sequence came; 0 where the policy expects no length."""
    slo_unattainable: bool = False
    """Whether the scheduler gave up its deadlines, and serves it when no other deadline suffers from that."""
    started_at: float | None = None
    """When its first step was planned, in seconds on the engine's clock; a preemption does not change it."""
    first_token_at: float | None = None
    """Seconds on the engine's clock."""
    substituted: int = 0
    """Expert assignments of this sequence where another expert stood in."""
    substituted_weight: float = 0.0
    """The same by router probability, a token in one layer counting 1."""
    assigned: int = 0
    """All its expert assignments so far; recomputed tokens count again."""
    routing_counts: Int[np.ndarray, "M E"] | None = None
    """How often its tokens wished for each expert; recomputed tokens count again. None before its first step."""
    sample: int = -1
    """Its number in the routing trace being recorded; -1 when it is not recorded."""
    num_recorded: int = 0
    """Positions below this are in the trace."""
    served: ServedLogits | None = None
    """Keeps logits of its answer, where that will be audited."""
    compared_with: ServedLogits | None = None
    """Of a text that an audit computes: what its logits are compared with."""

    @property
    def allowance(self) -> Allowance:
        """What of its tokens' wishes other experts may stand in for."""
        return allowance_of(self.routing, self.bounded)

    @property
    def num_known(self) -> int:
        """Tokens of prompt and answer that the host has read."""
        return len(self.prompt_token_ids) + len(self.generated)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer, with those that a step in flight still samples."""
        return self.num_known + self.num_pending

    @property
    def num_sampled(self) -> int:
        """Tokens of the answer, pending ones included."""
        return len(self.generated) + self.num_pending

    @property
    def decodes(self) -> bool:
        """Whether the next step feeds just the token sampled last."""
        return self.num_sampled > 0 and self.num_computed == self.num_tokens - 1

    @property
    def held(self) -> bool:
        """Whether it sits out a step, as what may come next is still being computed."""
        return self.adjustment is not None and self.adjustment.pending

    @property
    def finished(self) -> bool:
        """Whether the sequence has ended, for whatever reason; an aborted one has too."""
        return self.status is SequenceStatus.FINISHED

    def add_routing(self, counts: Int[np.ndarray, "M E"]) -> None:
        """Count the wishes of newly computed tokens. Neither keeps nor changes `counts`, which may be a view of a
        whole batch's."""
        if self.routing_counts is None:
            self.routing_counts = counts.copy()
        else:
            self.routing_counts += counts

    def tokens(self, start: int, length: int) -> list[int]:
        """Tokens at positions `start .. start + length - 1`, prompt and answer read as one, without pending ones."""
        end = start + length
        split = len(self.prompt_token_ids)
        return self.prompt_token_ids[start:end] + self.generated[max(0, start - split) : max(0, end - split)]
