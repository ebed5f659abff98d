"""Engines with experts in int8: the same bits at any slab size, and from a checkpoint that was converted before."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.checkpoint.convert import convert
from emoe_jax.errors import CheckpointError, ConfigError
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.models import open_checkpoint
from tests.engines import EngineFactory
from tests.golden.tiny import write_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden"
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(0, 60, size=length).tolist() for length in (3, 17, 40)]


@pytest.fixture(scope="module")
def full(engine_of: EngineFactory) -> Engine:
    return engine_of(expert_memory="100%", expert_format="int8")


@pytest.mark.parametrize("slots", [2, 5])
def test_exact_is_all_resident_bit_for_bit(engine_of: EngineFactory, full: Engine, slots: int) -> None:
    """With 2 slots even one token's experts fill a layer; experts come and go all the time."""
    engine = engine_of(expert_memory=f"{slots} slots", routing="exact", expert_format="int8", policy="lru")
    for prompt in PROMPTS:
        np.testing.assert_array_equal(engine.logits(prompt), full.logits(prompt, "exact"))
    outputs, wanted = engine.generate(PROMPTS, GREEDY), full.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in wanted]
    assert all(output.substituted == 0 for output in outputs)


def test_experts_with_biases_are_kept_in_int8(tmp_path: Path) -> None:
    raw = json.loads(str(np.load(GOLDEN / "gpt_oss_windows.npz")["config"]))
    directory = write_checkpoint(tmp_path / "model", raw)
    options: dict[str, Any] = {"policy": "lru", "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16}
    options |= {"expert_format": "int8", "routing": "exact"}
    found = []
    for memory in ("100%", f"{raw['num_experts_per_tok']} slots"):
        with Engine.load(directory, expert_memory=memory, **options) as engine:
            biases = engine.parts.residency.slab.weights[0].b_in
            assert biases is not None
            assert biases.dtype == np.float32
            found.append((engine.logits(PROMPTS[1]), engine.generate(PROMPTS[1], GREEDY)[0].token_ids))
    (full, wanted), (few, got) = found
    np.testing.assert_array_equal(few, full)
    assert got == wanted
    with pytest.raises(CheckpointError, match=r"experts with biases \(gpt_oss\) are not converted"):
        convert(open_checkpoint(directory), tmp_path / "converted")


def test_a_load_moves_a_quarter_of_the_bytes(engine_of: EngineFactory) -> None:
    """Counted by the loader, for the same loads. Scales are a tenth of experts as small as these."""
    bytes_per_load = {}
    for name in ("auto", "int8"):
        engine = engine_of(expert_memory="3 slots", routing="exact", expert_format=name, policy="lru")
        engine.generate(PROMPTS, GREEDY)
        loads = engine.parts.residency.loads
        assert loads.loads > 9
        bytes_per_load[name] = loads.loaded_bytes / loads.loads
    config = engine_of(expert_memory="3 slots", routing="exact", expert_format="int8", policy="lru").config
    scales = 4 * (config.expert_in_shape[0] + config.expert_out_shape[0])
    assert bytes_per_load["int8"] == bytes_per_load["auto"] / 4 + scales


def test_the_slab_is_int8_and_nothing_else_is(full: Engine) -> None:
    weights = full.parts.residency.slab.weights[0]
    assert [array.dtype.name for array in jax.tree.leaves(weights)] == ["int8", "int8", "float32", "float32"]
    assert full.parts.memory.expert_format == "int8"
    assert full.parts.memory.slab_bytes == 24 * RecordFormat.of(full.config, "int8").nbytes
    assert full.parts.memory.dtype == "float32"


def test_logits_are_close_to_those_of_float32(engine_of: EngineFactory, full: Engine) -> None:
    plain, eight = engine_of(expert_memory="100%").logits(PROMPTS[1]), full.logits(PROMPTS[1])
    assert 0 < np.abs(plain - eight).mean() < 0.01 * np.abs(plain).max()


def test_a_converted_checkpoint_gives_the_same_bits(tiny_checkpoint: Path, full: Engine, tmp_path: Path) -> None:
    convert(open_checkpoint(tiny_checkpoint), tmp_path / "int8")
    with Engine.load(tmp_path / "int8", max_num_seqs=4, max_num_batched_tokens=32, policy="static") as engine:
        assert engine.parts.memory.expert_format == "int8"
        np.testing.assert_array_equal(engine.logits(PROMPTS[2]), full.logits(PROMPTS[2]))


def test_a_format_that_there_is_not_is_refused(tiny_checkpoint: Path) -> None:
    wrong: Any = "int3"
    with pytest.raises(ConfigError, match="expert_format is 'int3'; expected one of auto, int8"):
        Engine.load(tiny_checkpoint, expert_format=wrong)
