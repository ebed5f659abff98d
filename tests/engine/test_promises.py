"""Contracts keep their promises whatever is resident: a policy that wants the wrong experts, mixed rows, few slots."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emoe_jax import Engine, SamplingParams
from emoe_jax.policies.policy import ResidencyPolicy
from emoe_jax.requests.contract import RoutingContract
from tests.engines import EngineFactory

TOP_K, LAYERS, EXPERTS, TOKENS = 2, 3, 8, 6


class Asked(NamedTuple):
    """A request."""

    prompt: list[int]
    contract: RoutingContract
    tolerance: float | None
    drawn: bool

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=TOKENS, temperature=float(self.drawn), seed=7, ignore_eos=True)


PROMPTS = st.lists(st.integers(0, 59), min_size=1, max_size=20)
REQUESTS = st.one_of(
    st.builds(Asked, PROMPTS, st.just("exact"), st.none(), st.booleans()),
    st.builds(Asked, PROMPTS, st.just("resident"), st.none(), st.booleans()),
    st.builds(Asked, PROMPTS, st.just("bounded"), st.sampled_from([0.0, 0.1, 0.3, 1.0]), st.booleans()),
)


class Adversary:
    """Scores that are drawn anew at every look, or without a seed those that want what was wished for least."""

    def __init__(self, policy: ResidencyPolicy, seed: int | None):
        self._rng = None if seed is None else np.random.default_rng(seed)
        self._policy = policy

    def scores(self) -> np.ndarray:
        if self._rng is not None:
            return self._rng.random((LAYERS, EXPERTS), np.float32)
        return -ResidencyPolicy.scores(self._policy)


@pytest.mark.parametrize("slots", [TOP_K, 5, EXPERTS])
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(REQUESTS, min_size=1, max_size=5), seed=st.none() | st.integers(0, 9))
def test_promises_hold_whatever_is_resident(
    engine_of: EngineFactory, slots: int, requests: list[Asked], seed: int | None
) -> None:
    engine, full = engine_of(expert_memory=f"{slots} slots", policy="lfu"), engine_of(expert_memory="100%")
    policy = engine.parts.residency.policy
    policy.scores = Adversary(policy, seed).scores
    try:
        outputs = run(engine, requests)
    finally:
        del policy.scores
    for asked, output in zip(requests, outputs, strict=True):
        [wanted] = full.generate([asked.prompt], asked.params, routing="exact")
        tokens = output.token_ids
        assert len(tokens) == TOKENS
        assert output.completions[0].error is None
        allowed = {"exact": 0.0, "resident": 1.0}.get(asked.contract, asked.tolerance or 0.0)
        assert output.substituted_weight <= allowed * (TOP_K - (asked.contract == "bounded")) + 1e-6
        if allowed == 0 or slots == EXPERTS:
            assert (output.substituted, output.substituted_weight) == (0, 0)
            assert tokens == wanted.token_ids


def run(engine: Engine, requests: list[Asked]) -> list:
    """All at once, so that their rows share batches."""
    for index, asked in enumerate(requests):
        options = {"routing": asked.contract, "tolerance": asked.tolerance}
        engine.add_request(str(index), asked.prompt, asked.params, **options)
    while engine.has_work():
        engine.step()
    return [engine.pop(str(index)) for index in range(len(requests))]
