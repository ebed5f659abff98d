"""Every backend of the MoE op with quantised experts: against the reference, and without copies of the slab."""

import numpy as np
import pytest

from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.moe import BACKENDS
from tests.lowering import Counts, export_for_cuda
from tests.moe.cases import OP, RUNNABLE, WAVE_EXACT, Case, abstract_operands, model, random_ids, random_slots

SHAPES = [  # format, R, k, E, C, ffn, D, F
    ("int8", 1, 1, 4, 4, "glu", 32, 48),
    ("int8", 3, 8, 8, 8, "double_glu", 24, 40),
    ("int8", 9, 2, 6, 2, "glu", 18, 52),
    ("int8", 70, 3, 64, 20, "double_glu", 32, 48),
    ("int8", 600, 2, 5, 3, "glu", 24, 40),
    ("int8", 9, 2, 6, 4, "clamped_glu", 32, 48),
    ("fp8", 1, 1, 4, 4, "glu", 32, 48),
    ("fp8", 9, 2, 6, 4, "double_glu", 144, 136),
    ("fp8", 3, 2, 5, 3, "glu", 264, 256),
    ("mxfp4", 1, 1, 4, 4, "clamped_glu", 32, 64),
    ("mxfp4", 9, 2, 6, 4, "clamped_glu", 96, 32),
    ("mxfp4", 40, 2, 5, 3, "glu", 64, 32),
]


def case_of(R: int, k: int, E: int, C: int, ffn: str = "glu", D: int = 32, F: int = 48, dtype="float32") -> Case:
    rng = np.random.default_rng(R)
    return Case.of(model(E, k, ffn, D, F), random_ids(rng, R, E, k), random_slots(rng, E, C), C, dtype=dtype)


FORMAT = pytest.mark.parametrize("name", ["int8", "fp8", "mxfp4"])
BACKEND = pytest.mark.parametrize("backend", RUNNABLE)


@BACKEND
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference_and_the_same_experts_in_float32(backend: str, shape: tuple):
    name, *sizes = shape
    case = case_of(*sizes).quantised(name)
    got = case.run(backend)
    np.testing.assert_allclose(got, case.run("reference"), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(got, case.dequantised(name).run("reference"), rtol=2e-5, atol=2e-5)


@BACKEND
@FORMAT
def test_matches_the_reference_with_rows_in_bfloat16(backend: str, name: str):
    case = case_of(16, 2, 8, 6, F=64, dtype="bfloat16").quantised(name)
    got, want = case.run(backend), case.run("reference")
    assert got.dtype == want.dtype == case.rows.dtype
    np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=2e-2, atol=3e-2)


@BACKEND
@FORMAT
def test_scales_of_nan_reach_only_the_rows_of_their_expert(backend: str, name: str):
    config = model(6, 2, expert_hidden=64)
    case = Case.of(config, [[0, 1], [2, 3], [1, 4], [5, 0]], np.arange(6), 6).quantised(name)
    want = case.run(backend)
    assert case.in_scales is not None
    case.in_scales[1] = 255 if name == "mxfp4" else np.nan
    got = case.run(backend)
    np.testing.assert_allclose(got[[1, 3]], want[[1, 3]], rtol=2e-5, atol=2e-5)
    assert np.isnan(got[[0, 2]]).all()


@pytest.mark.parametrize("backend", WAVE_EXACT)
@pytest.mark.parametrize(
    ("name", "R", "k", "size", "dtype"),
    [
        ("int8", 1, 4, 4, "float32"),
        ("int8", 40, 2, 3, "float32"),
        ("int8", 40, 2, 2, "bfloat16"),
        ("int8", 300, 2, 5, "float32"),
        ("fp8", 12, 2, 3, "float32"),
        ("mxfp4", 1, 4, 4, "float32"),
        ("mxfp4", 12, 2, 3, "bfloat16"),
    ],
)
def test_bits_do_not_depend_on_the_slab(backend: str, name: str, R: int, k: int, size: int, dtype: str):
    case = case_of(R, k, 8, 8, F=64, dtype=dtype).quantised(name)
    whole = case.run(backend)
    for seed in range(2):
        np.testing.assert_array_equal(case.run_in_waves(backend, size, seed), whole)


@FORMAT
@pytest.mark.parametrize("R", [1, 8, 512])
def test_no_expert_is_dequantised_as_a_whole(R: int, name: str):
    """On this machine: temporaries do not grow with the slab, and no expert of float32 would fit into them."""
    config = model(128, 2, hidden=1024, expert_hidden=2048)
    activations = R * config.top_k * (2 * config.hidden_size + 2 * config.expert_hidden) * 4
    sizes = []
    for capacity in (16, 128):
        operands = abstract_operands(config, R, capacity, "float32", name)
        memory = OP.lower(*operands, config=config).compile().memory_analysis()
        assert memory is not None
        sizes.append(memory.temp_size_in_bytes)
    assert max(sizes) < RecordFormat.of(config, "int8").nbytes + activations
    assert abs(sizes[1] - sizes[0]) < 64 << 10


def test_long_contractions_are_not_dequantised_either():
    """Mixtral 8x7B's sizes, of which one expert takes 176 MB."""
    config = model(8, 2, hidden=4096, expert_hidden=14336)
    operands = abstract_operands(config, 8, 4, "float32", "int8")
    memory = OP.lower(*operands, config=config).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 << 20


@FORMAT
@pytest.mark.parametrize("backend", [name for name, backend in BACKENDS.items() if backend.runs_on("cuda")])
def test_nothing_makes_the_host_wait_on_cuda(backend: str, name: str):
    config = model(8, 2, hidden=64, expert_hidden=96)
    operands = abstract_operands(config, 8, 6, "bfloat16", name)
    counts = Counts.of(export_for_cuda(OP, *operands, config=config, backend=backend, platform="cuda"))
    assert (counts.traced_loops, counts.conditionals, counts.callbacks, counts.counted_loops) == (0, 0, 0, 0)
    assert counts.kernels == (2 if backend == "triton" else 0)
