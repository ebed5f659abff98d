"""What `generation_config.json` says for requests that say nothing, and the name of a checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from emoe_jax import Engine, EngineConfig, SamplingParams
from emoe_jax.engine.defaults import model_name, sampling_defaults
from emoe_jax.errors import CheckpointError, ConfigError
from tests.serve.checkpoint import write_tiny_checkpoint


def written(directory: Path, **values: object) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(values))
    return directory


def test_the_files_values_are_fields(tmp_path):
    values = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05}
    file = written(tmp_path, **values, max_new_tokens=2048, do_sample=True, eos_token_id=[1, 2], pad_token_id=None)
    assert sampling_defaults(file) == values | {"max_tokens": 2048}
    assert sampling_defaults(file, "none") == {}
    assert sampling_defaults(tmp_path / "elsewhere") == {}


def test_what_is_null_or_not_said_is_open(tmp_path):
    assert sampling_defaults(written(tmp_path, temperature=None, do_sample=False, length_penalty=2)) == {}


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", "hot"), ("top_p", 7), ("top_k", -5), ("max_new_tokens", 0)]
)
def test_values_that_nobody_could_ask_for_are_told(tmp_path, name, value):
    field = "max_tokens" if name == "max_new_tokens" else name
    with pytest.raises(CheckpointError, match=f"generation_config.json: {field} is .*generation_config none") as error:
        sampling_defaults(written(tmp_path, **{name: value}))
    assert "\n" not in str(error.value)


def test_two_modes(tmp_path):
    assert sampling_defaults(written(tmp_path, temperature=0.5), "auto") == {"temperature": 0.5}
    assert sampling_defaults(tmp_path, "none") == {}
    with pytest.raises(ConfigError, match="generation_config is 'vllm'; expected one of auto, none"):
        EngineConfig(generation_config="vllm")  # pyright: ignore[reportArgumentType]


def test_an_engine_uses_them_where_no_parameters_are_given(tmp_path):
    write_tiny_checkpoint(tmp_path / "tiny")
    written(tmp_path / "tiny", temperature=0.0, max_new_tokens=3)
    options = {"expert_memory": "100%", "max_num_seqs": 2, "max_num_batched_tokens": 16}
    with Engine.load(tmp_path / "tiny", **options) as engine:
        assert engine.sampling_defaults == {"temperature": 0.0, "max_tokens": 3}
        greedy = engine.generate([[5, 6]], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))[0].token_ids
        said = engine.generate([[5, 6]])[0].token_ids
        assert said == greedy[: len(said)]
        assert len(said) == 3 or said[-1] == 1
        assert sum(len(delta.token_ids) for delta in engine.stream([5, 6])) == len(said)
    shutil.rmtree(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("checkpoints/demo", "demo"),
        ("allenai/OLMoE-1B-7B", "OLMoE-1B-7B"),
        ("/root/.cache/hub/models--allenai--OLMoE-1B-7B/snapshots/0a1b2c", "allenai/OLMoE-1B-7B"),
        (Path("/x/models--Qwen--Qwen3-30B--A3B/snapshots/main/"), "Qwen/Qwen3-30B--A3B"),
        ("/x/models--gpt2/snapshots/0a1b2c", "gpt2"),
        ("/x/models--a--b/snapshots/0a1b2c/inner", "inner"),
        ("/x/snapshots/0a1b2c", "0a1b2c"),
    ],
)
def test_a_snapshot_has_its_repositorys_name(path, name):
    assert model_name(path) == name
