"""The policy `pre-gated`: layer by layer, the next layer's experts are asked for while this one computes."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.attention.uncached import causal_attend
from emoe_jax.models.rope import Rotation
from emoe_jax.residency.ahead import LoadsAhead
from tests.engines import TINY, EngineFactory, random_model
from tests.golden.tiny import CONFIGS, OPENMOE, write_checkpoint

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 60, size=length).tolist() for length in (3, 11)]
FAMILIES = {"mixtral": CONFIGS["mixtral_window"], "qwen2": CONFIGS["qwen2_windows"], "openmoe": OPENMOE}
"""The second has a layer without experts in between, and the third has one between any two with experts."""


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_fully_resident_model(family: str, tmp_path: Path) -> None:
    """Alone and together, at as few slots as a token needs."""
    checkpoint = write_checkpoint(tmp_path / "model", FAMILIES[family])
    options: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "prefix_caching": False}
    with Engine.load(checkpoint, expert_memory="100%", policy="static", **options) as engine:
        expected = [output.token_ids for output in engine.generate(PROMPTS, GREEDY)]
    options |= {"policy": "pre-gated", "routing": "exact"}
    with Engine.load(checkpoint, expert_memory="3 slots", **options) as engine:
        assert [engine.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS] == expected
        outputs = engine.generate(PROMPTS, GREEDY)
        ahead = engine.state()["residency"]["ahead"]
    assert [output.token_ids for output in outputs] == expected
    assert all(output.substituted == 0 for output in outputs)
    assert ahead["misses"] > 0
    assert ahead["spared"] + ahead["late"] > 0
    assert ahead["asked"] == ahead["spared"] + ahead["late"] + ahead["useless"] + ahead["withdrawn"]


def test_the_next_layers_experts_are_asked_for_before_it_is_reached(
    engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the next layer's router on this layer's input: layers 1 and 2 of 3, after the layer before, before itself."""
    engine = engine_of(expert_memory="3 slots", policy="pre-gated", routing="exact")
    noted: list[tuple[str, int, np.ndarray]] = []
    expect, arrive = LoadsAhead.expect, LoadsAhead.arrive

    def expecting(self: LoadsAhead, layer: int, counts: np.ndarray) -> None:
        noted.append(("expect", layer, counts))
        expect(self, layer, counts)

    def arriving(self: LoadsAhead, layer: int, needed: np.ndarray) -> None:
        noted.append(("arrive", layer, needed))
        arrive(self, layer, needed)

    monkeypatch.setattr(LoadsAhead, "expect", expecting)
    monkeypatch.setattr(LoadsAhead, "arrive", arriving)
    prompt = [7, 11, 23, 42, 5]
    engine.generate(prompt, GREEDY)
    step = [("arrive", 0), ("expect", 1), ("arrive", 1), ("expect", 2), ("arrive", 2)]
    assert [(what, layer) for what, layer, _ in noted] == step * GREEDY.max_tokens

    model, _ = random_model(TINY)
    positions = jnp.arange(len(prompt))[None]
    x, _ = model.layers[0].attention(
        model.embed(jnp.asarray([prompt])),
        Rotation.of(positions, model.config),
        causal_attend(model.config, None, positions),
    )
    own, following = (np.bincount(model.layers[m].moe_input(x)[1].wish_ids.ravel(), minlength=8) for m in (0, 1))
    assert own.tolist() != following.tolist()
    assert noted[1][2].tolist() == following.tolist()


def test_logits_are_bit_for_bit_those_of_loads_on_demand(engine_of: EngineFactory) -> None:
    """Also where a slot of a layer is taken by an expert that a step before had asked for ahead."""
    looking, waiting = (
        engine_of(expert_memory="3 slots", policy=policy, routing="exact") for policy in ("pre-gated", "lru")
    )
    for prompt in (PROMPTS[1], list(range(20, 50))):
        np.testing.assert_array_equal(looking.logits(prompt), waiting.logits(prompt))
        assert looking.generate(prompt, GREEDY)[0].token_ids == waiting.generate(prompt, GREEDY)[0].token_ids


def test_a_resident_step_stops_at_no_router(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="3 slots", policy="pre-gated")
    before = engine.state()["residency"]["ahead"]
    engine.generate(PROMPTS[1], GREEDY, routing="resident")
    assert engine.state()["residency"]["ahead"] == before
