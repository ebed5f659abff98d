import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.ranking import Ranking

SEQUENCES = [Sequence(str(index), [1], order=index) for index in range(8)]


class RankingMachine(RuleBasedStateMachine):
    """Against a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.ranking = Ranking()
        self.model: dict[Sequence, float] = {}

    @rule(sequence=st.sampled_from(SEQUENCES), rank=st.floats(-5, 5))
    def add(self, sequence: Sequence, rank: float) -> None:
        self.ranking.add(sequence, rank)
        self.model[sequence] = rank

    @rule(sequence=st.sampled_from(SEQUENCES))
    def discard(self, sequence: Sequence) -> None:
        self.ranking.discard(sequence)
        self.model.pop(sequence, None)

    @rule()
    def fill_and_empty(self) -> None:
        for turn in range(100):
            self.ranking.add(SEQUENCES[turn % 8], turn)
        for sequence in SEQUENCES:
            self.discard(sequence)

    @invariant()
    def agrees(self) -> None:
        first = min(self.model, key=lambda sequence: (self.model[sequence], sequence.order), default=None)
        assert self.ranking.first() is first
        assert self.ranking.first_rank() == (math.inf if first is None else self.model[first])
        ascending = [(rank, sequence.order) for rank, sequence in self.ranking.ascending()]
        assert ascending == sorted((rank, sequence.order) for sequence, rank in self.model.items())
        assert len(self.ranking) == len(self.model)
        assert all((sequence in self.ranking) == (sequence in self.model) for sequence in SEQUENCES)


TestRanking = RankingMachine.TestCase
TestRanking.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
