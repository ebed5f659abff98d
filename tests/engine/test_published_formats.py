"""Engines of checkpoints in published quantised formats: the slab has the file's bits, and answers are the twin's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe_jax import Engine
from emoe_jax.experts.record_format import RecordFormat
from tests.golden.packed import write_fp8, write_mxfp4

PROMPT = np.random.default_rng(7).integers(3, 90, size=17).tolist()
OPTIONS: dict[str, Any] = {"policy": "lru", "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16}
OPTIONS |= {"routing": "exact", "prefix_caching": False, "audit_rate": 0.0}


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_mxfp4(tmp_path_factory.mktemp("mxfp4"))


@pytest.fixture(scope="module")
def full(mxfp4: tuple[Path, Path]) -> Iterator[Engine]:
    with Engine.load(mxfp4[0], expert_memory="100%", **OPTIONS) as engine:
        yield engine


def test_exact_is_all_resident_and_a_load_moves_the_bytes_of_four_bits(mxfp4: tuple[Path, Path], full: Engine) -> None:
    """A quarter of bfloat16's bytes and a scale for each 32 weights, besides the biases. Counted by the loader."""
    with Engine.load(mxfp4[0], expert_memory="2 slots", **OPTIONS) as engine:
        np.testing.assert_array_equal(engine.logits(PROMPT), full.logits(PROMPT))
        loads, config = engine.parts.residency.loads, engine.config
    assert loads.loads > 9
    weights = 2 * 32 * 64 + 64 * 32
    biases = 4 * (2 * 32 + 64)
    assert loads.loaded_bytes / loads.loads == weights * 2 // 4 + weights // 32 + biases
    assert RecordFormat.of(config, "bfloat16").nbytes == weights * 2 + biases // 2


def test_the_slab_holds_bytes_and_logits_are_those_of_the_twin(mxfp4: tuple[Path, Path], full: Engine) -> None:
    weights = full.parts.residency.slab.weights[0]
    arrays = (weights.w_in, weights.w_out, weights.in_scales, weights.out_scales, weights.b_in, weights.b_out)
    dtypes = ["uint8"] * 4 + ["float32"] * 2
    assert [array.dtype.name for array in arrays if array is not None] == dtypes
    assert full.parts.memory.expert_format == "mxfp4"
    assert full.parts.memory.slab_bytes == 3 * 5 * RecordFormat.of(full.config, "mxfp4").nbytes
    with Engine.load(mxfp4[1], expert_memory="100%", **OPTIONS) as twin:
        np.testing.assert_allclose(full.logits(PROMPT), twin.logits(PROMPT), atol=2e-4, rtol=0)


def test_fp8_is_exact_and_a_load_moves_a_quarter_of_float32(tmp_path: Path) -> None:
    """And the scales, of which each of the three matrices has two by two."""
    packed, _ = write_fp8(tmp_path, "qwen3_moe")
    found = []
    for memory in ("100%", "3 slots"):
        with Engine.load(packed, expert_memory=memory, **OPTIONS) as engine:
            assert engine.parts.memory.expert_format == "fp8"
            found.append(engine.logits(PROMPT))
            loads = engine.parts.residency.loads
    np.testing.assert_array_equal(*found)
    assert loads.loaded_bytes / loads.loads == 3 * 136 * 144 + 4 * 3 * 2 * 2


def test_int8_is_made_of_it_on_request(mxfp4: tuple[Path, Path], full: Engine) -> None:
    with Engine.load(mxfp4[0], expert_memory="2 slots", expert_format="int8", **OPTIONS) as engine:
        assert engine.parts.residency.slab.weights[0].w_in.dtype == np.int8
        assert 0 < np.abs(engine.logits(PROMPT) - full.logits(PROMPT)).mean() < 0.05
