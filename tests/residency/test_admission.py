import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe_jax import SLO, Engine, SamplingParams
from emoe_jax.errors import ConfigError, SloUnattainable
from emoe_jax.experts.loader_stats import LoaderStats
from emoe_jax.requests.contract import RoutingContract
from emoe_jax.requests.sequence import Sequence
from emoe_jax.residency.admission import ExpertLoading
from emoe_jax.tasks import TaskProfile
from tests.engines import EngineFactory

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
PROMPTS = [[5, 9, 31, 7], [1, 2], [40, 3, 8, 8, 8, 11]]


@pytest.mark.parametrize("policy", ["fcfs", "slo"])
def test_both_policies_give_the_same_tokens(engine_of: EngineFactory, policy: str):
    engine = engine_of(expert_memory="100%", scheduling_policy=policy)
    alone = [engine.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]
    together = engine.generate([*PROMPTS, *PROMPTS], GREEDY)
    assert [output.token_ids for output in together] == [*alone, *alone]
    state = engine.state()["scheduler"]
    assert (state["policy"], state["waiting"], state["running"]) == (policy, 0, 0)
    json.dumps(state)


def test_step_times_and_lengths_are_observed(engine_of: EngineFactory):
    engine = engine_of(expert_memory="100%", scheduling_policy="slo")
    before = engine.state()["scheduler"]["cost"]["observed"]
    engine.generate(PROMPTS, GREEDY, task="qa")
    state = engine.state()["scheduler"]
    assert state["cost"]["observed"] >= before + 6
    assert state["output_tokens"].get("qa", 128) < 128


def test_deadlines(engine_of: EngineFactory):
    engine = engine_of(expert_memory="100%", scheduling_policy="slo")
    kept = engine.generate(PROMPTS[0], GREEDY, slo=SLO(ttft_ms=1e6, latency_ms=1e6), task="kept")[0]
    lost = engine.generate(PROMPTS[0], GREEDY, slo=SLO(ttft_ms=1e-3), task="lost")[0]
    assert (kept.slo_unattainable, lost.slo_unattainable) == (False, True)
    assert kept.token_ids == lost.token_ids
    tasks = engine.state()["scheduler"]["slo"]["tasks"]
    assert (tasks["kept"]["attainment"], tasks["lost"]["attainment"]) == (1.0, 0.0)
    with pytest.raises(SloUnattainable, match=r"ttft_ms of 0\.001 cannot be kept: the first token is expected after"):
        engine.generate(PROMPTS[0], GREEDY, slo=SLO(ttft_ms=1e-3, strict=True))
    assert not engine.has_work()


def test_a_task_has_usual_deadlines(engine_of: EngineFactory):
    engine = engine_of(expert_memory="100%", scheduling_policy="slo")
    before = engine.task_profile
    engine.use_task_profile(TaskProfile.empty(engine.config).with_task("hasty", slo=SLO(ttft_ms=1e-3)))
    try:
        assert engine.generate(PROMPTS[0], GREEDY, task="hasty")[0].slo_unattainable
        assert not engine.generate(PROMPTS[0], GREEDY, task="hasty", slo=SLO(ttft_ms=1e6))[0].slo_unattainable
        assert not engine.generate(PROMPTS[0], GREEDY, task="other")[0].slo_unattainable
    finally:
        engine.use_task_profile(before)


def test_an_unknown_policy_is_refused_before_loading(tiny_checkpoint: Path):
    unknown: Any = "lifo"
    with pytest.raises(ConfigError, match="'lifo'; expected one of slo, fcfs"):
        Engine.load(tiny_checkpoint, scheduling_policy=unknown)


def test_policies_take_turns_and_keep_what_they_learned(engine_of: EngineFactory):
    engine = engine_of(expert_memory="100%", seed=5)
    greedy = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    engine.generate([1, 2, 3], greedy)
    learned = engine.state()["scheduler"]["cost"]["observed"]
    assert learned > 0
    for name in ("slo-without-aging", "fcfs"):
        engine.use_scheduling_policy(name)
        assert engine.state()["scheduler"]["policy"] == name
        engine.generate([1, 2, 3], greedy)
    engine.use_scheduling_policy("slo")
    assert engine.state()["scheduler"]["cost"]["observed"] == learned
    with pytest.raises(ConfigError, match="scheduling policy is 'lifo'"):
        engine.use_scheduling_policy("lifo")
    engine.add_request("waits", [1, 2, 3], greedy)
    with pytest.raises(ValueError, match="1 sequences wait"):
        engine.use_scheduling_policy("fcfs")
    while engine.has_work():
        engine.step()
    engine.pop("waits")


class FakeTable:
    capacities = (2,)
    resident_mask = np.array([[True, True, False, False]])


class FakeResidency:
    """One layer whose first two experts are resident; loads took 1 s per 1000 bytes, commits 0.1 s each."""

    policy_name = "emoe"
    table = FakeTable()
    loads = LoaderStats(loads=4, staged_bytes=4000, busy_seconds=4.0, commit_seconds=0.4)

    expert_bytes = 1000


def profile_of(**routing: list[float]) -> TaskProfile:
    """Of one layer of four experts, top-1."""
    profile = TaskProfile(1, 4, 1)
    for name, shares in routing.items():
        profile = profile.with_task(name, routing=np.array([shares]))
    return profile


PLACES = profile_of(here=[0.4, 0.4, 0.1, 0.1], away=[0.1, 0.1, 0.4, 0.4])


def seconds(
    residency: FakeResidency,
    task: str,
    routing: RoutingContract,
    tokens: int = 3,
    profile: TaskProfile = PLACES,
    cached: int = 0,
) -> float:
    loading = ExpertLoading(profile, residency)  # pyright: ignore[reportArgumentType]
    return loading.seconds(Sequence("id", [1] * tokens, task=task, routing=routing, num_cached=cached))


def test_an_exact_prompt_loads_each_absent_expert_that_its_tokens_choose():
    residency = FakeResidency()
    for tokens in (1, 3, 40):
        assert seconds(residency, "away", "exact", tokens) == pytest.approx(2 * (1 - 0.6**tokens))
        assert seconds(residency, "here", "exact", tokens) == pytest.approx(2 * (1 - 0.9**tokens))
    # A task that is not known counts as the mean of those that are; computed tokens choose nothing any more.
    assert seconds(residency, "new", "exact", 3) == pytest.approx(2 * (1 - 0.75**3))
    assert seconds(residency, "away", "exact", 40, cached=39) == pytest.approx(2 * 0.4)
    residency.loads = LoaderStats(loads=4, waited_loads=4, wait_seconds=2.0)
    assert seconds(residency, "away", "exact", 1) == pytest.approx(0.5 * 2 * 0.4)
    residency.loads = LoaderStats()
    assert seconds(residency, "away", "exact") == 0
    assert seconds(residency, "away", "exact", profile=TaskProfile(1, 4, 1)) == 0


def test_under_resident_only_commits_of_what_a_policy_loads_count():
    residency = FakeResidency()
    assert seconds(residency, "here", "resident") == seconds(residency, "new", "resident") == 0
    assert seconds(residency, "away", "resident") == pytest.approx(0.2)
    deaf = PLACES.with_task("deaf", routing=np.array([[0.1, 0.1, 0.4, 0.4]]), sensitivity=(0.0,))
    assert seconds(residency, "deaf", "resident", profile=deaf) == 0
    assert seconds(residency, "deaf", "exact", 1, profile=deaf) == pytest.approx(0.8)
    residency.policy_name = "lru"  # loads what it misses, whoever wishes for it
    assert seconds(residency, "deaf", "resident", profile=deaf) == pytest.approx(0.2)
    for name in ("static-global", "random", "emoe-paper"):
        residency.policy_name = name
        assert seconds(residency, "away", "resident") == 0
    residency = FakeResidency()
    residency.loads = LoaderStats()
    assert seconds(residency, "away", "resident") == 0
