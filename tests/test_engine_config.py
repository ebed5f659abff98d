"""`EngineConfig` beside what it names: policies and keywords of `Engine.load`."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emoe_jax import ConfigError, Engine, EngineConfig
from emoe_jax.option_fields import options_of
from emoe_jax.policies import POLICIES
from emoe_jax.scheduling import registry

OPTIONS = {option.name: option for option in options_of(EngineConfig)}


def test_the_names_of_policies_are_those_there_are() -> None:
    assert sorted(OPTIONS["policy"].words) == sorted(POLICIES)
    assert OPTIONS["scheduling_policy"].words == registry.SCHEDULING_POLICIES + registry.VARIANTS
    assert OPTIONS["scheduling_policy"].shown_words == registry.SCHEDULING_POLICIES


def test_every_option_is_explained_in_one_sentence() -> None:
    for name, option in OPTIONS.items():
        assert len(option.traits.help) > 20, name
        assert not option.traits.help.endswith("."), name
        assert "\n" not in option.traits.help, name


def test_options_load_no_jax() -> None:
    code = "import sys; from emoe_jax import EngineConfig; EngineConfig(); sys.exit('jax' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_num_seq": 4}, "unknown option 'max_num_seq'; the nearest known one is 'max_num_seqs'"),
        ({"expert_memroy": "40%"}, "unknown option 'expert_memroy'; the nearest known one is 'expert_memory'"),
        ({"expert_memory": "-5%"}, "expert_memory '-5%' is not an amount; expected for example 40%, 6GiB or 8 slots"),
        ({"expert_memory": "0 slots"}, "expert_memory: '0 slots' is nothing; the model needs at least its top-k"),
        ({"expert_memory": "140%"}, "expert_memory '140%' is more than all experts; at most 100%"),
        ({"host_memory": "40%"}, "host_memory '40%' is not an amount of bytes; expected for example 2GiB"),
        ({"kv_memory": -1}, "kv_memory is -1; expected a positive number of bytes"),
        ({"device_memory": "all"}, "device_memory 'all' is not an amount of bytes"),
        ({"link_bandwidth": "-1GiB"}, "link_bandwidth '-1GiB' is not an amount of bytes"),
        ({"routing": "best"}, "routing is 'best'; expected one of resident, bounded, exact"),
        ({"dtype": "int4"}, "dtype is 'int4'; expected one of auto, float32, bfloat16, float16"),
        ({"load_wait_ms": -1}, "load_wait_ms is -1; expected at least 0"),
        ({"router_capacity_factor": 0.0}, "router_capacity_factor is 0.0; expected more than 0"),
        ({"generation_config": "model"}, "generation_config is 'model'; expected one of auto, none"),
        ({"overlap": "yes"}, "overlap is 'yes'; expected true or false"),
        ({"seed": -1}, "seed is -1; expected at least 0"),
    ],
)
def test_a_wrong_keyword_is_named_before_anything_is_read(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Engine.load("/nonexistent", **keywords)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "platform", "size"),
    [
        ({}, "cpu", (16, 512)),
        ({}, "gpu", (256, 8192)),
        ({}, "tpu", (256, 8192)),
        ({"max_num_seqs": 4}, "gpu", (4, 8192)),
        ({"max_num_batched_tokens": 64}, "gpu", (64, 64)),
        ({"max_num_batched_tokens": 7}, "cpu", (7, 7)),
        ({"max_num_seqs": 2000}, "cpu", (2000, 512)),  # refused by the scheduler, which names both
        ({"max_num_seqs": "auto", "max_num_batched_tokens": "auto"}, "cpu", (16, 512)),
    ],
)
def test_the_size_of_a_step_goes_by_the_platform(given: Any, platform: str, size: tuple[int, int]) -> None:
    config = EngineConfig(**given)
    assert config.step_size(platform) == size
    resolved = config.resolved(platform)
    assert (resolved.max_num_seqs, resolved.max_num_batched_tokens) == size
    assert resolved.step_size("another") == size


def test_options_are_given_in_one_way() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs is given beside an EngineConfig"):
        Engine.load("/nonexistent", EngineConfig(), max_num_seqs=4)
    wrong: Any = {"max_num_seqs": 4}
    with pytest.raises(ConfigError, match="config is dict; expected an EngineConfig"):
        Engine.load("/nonexistent", wrong)


@pytest.mark.parametrize("every", [0, -3, 1.5, True, "often", None])
def test_predicting_less_than_every_prompt_is_refused(every: Any) -> None:
    with pytest.raises(ConfigError, match="predict_every"):
        EngineConfig(predict_every=every)


def test_prompt_tokens_are_recorded_in_a_trace_only() -> None:
    with pytest.raises(ConfigError, match="record_prompt_tokens needs record_traces"):
        EngineConfig(record_prompt_tokens=True)
    assert EngineConfig(record_prompt_tokens=True, record_traces="trace.npz").record_prompt_tokens
