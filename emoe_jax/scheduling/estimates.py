"""What the future of a sequence looks like, from the cost model and the expected length of its answer."""

import math

from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.cost import CostModel
from emoe_jax.scheduling.lengths import OutputLengths, remaining_tokens
from emoe_jax.scheduling.plan import StepPlan

PACE_MEMORY = 0.05
"""Weight of the newest step in the average step time."""


class Estimates:
    """All times in seconds. `pace` is what a token of a running sequence takes: the average step, prompts of others
    included, which is `c` of eMoE eq. 3 for a machine that is kept busy.
    """

    def __init__(
        self,
        lengths: OutputLengths,
        model: CostModel,
        max_num_seqs: int,
        max_model_len: int,
        prefill_chunk: int,
        learns: bool = True,
    ):
        """`learns` False: what steps take is never observed, and all times stay those of `model`."""
        self.learns = learns
        self.lengths = lengths
        self.model = model
        self.max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._prefill_chunk = prefill_chunk
        self.pace = model.cost.seconds(max_num_seqs)
        self.miss_wait = 0.0
        """What a token waits for loads on top of that, where its contract does: the average over such steps."""

    def observe(self, plan: StepPlan, seconds: float, waited: float = 0.0) -> None:
        """A step of this plan took `seconds`, and `waited` more for experts to be loaded."""
        if not self.learns:
            return
        self.model.observe(plan, seconds)
        if plan.decodes:
            # One step that had to be compiled must not count for many.
            self.pace += PACE_MEMORY * (min(seconds, 10 * self.pace) - self.pace)
            if any(sequence.routing != "resident" for sequence in plan.decodes):
                self.miss_wait += PACE_MEMORY * (min(waited, 10 * self.pace) - self.miss_wait)

    def expect(self, sequence: Sequence) -> None:
        """Note on a new sequence how long its answer will be."""
        sequence.expected_tokens = self.lengths.expected(sequence, self._max_model_len)

    def remaining(self, sequence: Sequence) -> float:
        """`G_i` of eMoE eq. 3: tokens that it has still to generate."""
        return remaining_tokens(sequence.expected_tokens, len(sequence.generated))

    def prefill(self, sequence: Sequence) -> float:
        """What is left of computing its prompt (`W * c` of eMoE eq. 3), and its own tokens after a preemption."""
        tokens = sequence.num_tokens - max(sequence.num_computed, sequence.num_cached)
        return self.model.cost.prefill(tokens, -(-tokens // self._prefill_chunk))

    def work(self, sequence: Sequence) -> float:
        """Its share of the machine's time when all places are taken."""
        cost = self.model.cost
        return self.prefill(sequence) + self.remaining(sequence) * (cost.decode + cost.step / self.max_num_seqs)

    def latest_start(self, sequence: Sequence) -> float:
        """When a waiting sequence must start to keep its deadlines; infinite when it has none."""
        return min(self.latest_starts(sequence).values(), default=math.inf)

    def latest_starts(self, sequence: Sequence) -> dict[str, float]:
        """When it must start to keep each of the deadlines that it has, by their names in `SLO`."""
        slo, starts = sequence.slo, {}
        if slo.ttft_ms is None and slo.latency_ms is None:
            return starts
        started = sequence.arrival - self.prefill(sequence)
        if slo.ttft_ms is not None and sequence.first_token_at is None:
            starts["ttft_ms"] = started + slo.ttft_ms / 1e3 - self.model.cost.step
        if slo.latency_ms is not None:
            starts["latency_ms"] = started + slo.latency_ms / 1e3 - self.remaining(sequence) * self.pace_of(sequence)
        return starts

    def slack(self, sequence: Sequence, now: float) -> float:
        """How much later than expected a running sequence may end; infinite without a deadline for its end."""
        if sequence.slo.latency_ms is None:
            return math.inf
        return (
            sequence.arrival + sequence.slo.latency_ms / 1e3 - now - self.remaining(sequence) * self.pace_of(sequence)
        )

    def first_token_slack(self, sequence: Sequence, now: float) -> float:
        """How much more than its steps the first token of a running prompt may take; infinite without a deadline.

        What computing its prompt and those of others takes is not among the steps.
        """
        if sequence.slo.ttft_ms is None or sequence.first_token_at is not None or sequence.decodes:
            return math.inf
        return sequence.arrival + sequence.slo.ttft_ms / 1e3 - now - self.prefill_steps(sequence) * self.model.cost.step

    def prefill_steps(self, sequence: Sequence) -> int:
        """The fewest steps that compute the rest of a prompt."""
        tokens = sequence.num_tokens - max(sequence.num_computed, sequence.num_cached)
        return -(-tokens // self._prefill_chunk)

    def pace_of(self, sequence: Sequence) -> float:
        """Seconds that a token of this sequence takes, the loads included that its contract waits for."""
        return self.pace + (self.miss_wait if sequence.routing != "resident" else 0.0)
