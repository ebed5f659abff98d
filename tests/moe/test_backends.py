"""Every backend of the MoE op against the reference, and what they promise beyond being right."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.config import ModelConfig
from emoe_jax.moe import BACKENDS
from emoe_jax.moe import gather as gather_module
from tests.lowering import Counts, export_for_cuda
from tests.moe.cases import OP, RUNNABLE, WAVE_EXACT, Case, D, F, abstract_operands, model, random_ids, random_slots

SHAPES = [  # R, k, E, C, ffn, D, F
    (1, 1, 4, 4, "glu", 32, 48),
    (3, 8, 8, 8, "double_glu", 24, 40),  # each row has all experts; no size is a multiple of 16
    (8, 2, 16, 5, "glu", 32, 48),
    (9, 2, 6, 2, "glu", 18, 52),  # as many slots as a row has experts
    (70, 3, 64, 20, "double_glu", 32, 48),
    (600, 2, 5, 3, "glu", 24, 40),
    (3, 8, 8, 8, "clamped_glu", 24, 40),
    (70, 3, 16, 9, "clamped_glu", 32, 48),
]


@pytest.mark.parametrize("backend", RUNNABLE)
class TestEveryBackend:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_matches_the_reference(self, backend: str, shape: tuple[int, int, int, int, str, int, int]):
        R, k, E, C, ffn, hidden, expert_hidden = shape
        rng = np.random.default_rng(R)
        config = model(E, k, ffn, hidden, expert_hidden)
        case = Case.of(config, random_ids(rng, R, E, k), random_slots(rng, E, C), C)
        np.testing.assert_allclose(case.run(backend), case.run("reference"), rtol=2e-5, atol=2e-5)

    @pytest.mark.parametrize(("hidden", "expert_hidden"), [(32, 48), (24, 40)])
    def test_matches_the_reference_in_bfloat16(self, backend: str, hidden: int, expert_hidden: int):
        rng = np.random.default_rng(0)
        config = model(8, 2, "double_glu", hidden, expert_hidden)
        case = Case.of(config, random_ids(rng, 40, 8, 2), random_slots(rng, 8, 6), 6, dtype="bfloat16")
        got, want = case.run(backend), case.run("reference")
        assert got.dtype == want.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=2e-2, atol=3e-2)

    def test_all_rows_to_one_expert(self, backend: str):
        case = Case.of(model(6, 1), np.full((300, 1), 4), [6, 6, 6, 6, 2, 6], 6)
        np.testing.assert_allclose(case.run(backend), case.run("reference"), rtol=2e-5, atol=2e-5)

    def test_rows_without_assignment_keep_the_accumulator(self, backend: str):
        case = Case.of(model(4, 2), [[4, 4], [0, 4], [4, 3], [1, 2]], [0, 4, 4, 1], 4)
        start = jnp.asarray(np.random.default_rng(1).standard_normal((4, D)), jnp.float32)
        out = case.run(backend, start)
        np.testing.assert_array_equal(out[0], start[0])
        np.testing.assert_array_equal(out[3], start[3])  # both its experts are absent
        np.testing.assert_allclose(out, case.run("reference", start), rtol=2e-5, atol=2e-5)
        assert np.abs(out[1:3] - start[1:3]).max() > 1e-3

    def test_nobody_assigned(self, backend: str):
        case = Case.of(model(4, 2), np.full((9, 2), 4), [0, 1, 2, 3], 4)
        np.testing.assert_array_equal(case.run(backend), np.zeros((9, D)))

    @given(data=st.data())
    @settings(max_examples=15, deadline=None, derandomize=True)
    def test_any_routing(self, backend: str, data: st.DataObject):
        """Shapes are fixed so that nothing recompiles; ids, drops, slots and imbalance are hypothesis' choice."""
        E, C, R, k = 6, 4, 20, 2
        row = st.permutations(range(E + 1)).map(lambda p: [p[0], p[1]])  # E is "no assignment"
        popular = st.sampled_from([[0, 1], [5, 0], [E, E]])
        ids = data.draw(st.lists(st.one_of(row, popular), min_size=R, max_size=R))
        slots = np.array(data.draw(st.permutations([0, 1, 2, 3, 4, 5])))
        case = Case.of(model(E, k), ids, np.minimum(slots, C), C, seed=data.draw(st.integers(0, 9)))
        np.testing.assert_allclose(case.run(backend), case.run("reference"), rtol=2e-5, atol=2e-5)

    def test_compiles_once_per_shape(self, backend: str):
        rng = np.random.default_rng(0)
        config = model(6, 2)
        before = compilations()
        for seed in range(3):
            case = Case.of(config, random_ids(rng, 11, 6, 2), random_slots(rng, 6, 4), 4, seed=seed)
            case.run(backend)
        assert compilations() == before + 1


@pytest.mark.parametrize("backend", WAVE_EXACT)
class TestWaves:
    @pytest.mark.parametrize(
        ("R", "k", "size", "dtype", "ffn"),
        [
            (1, 4, 4, "float32", "glu"),
            (40, 2, 3, "float32", "glu"),
            (40, 2, 2, "bfloat16", "glu"),
            (300, 2, 5, "float32", "glu"),
            (40, 2, 3, "bfloat16", "clamped_glu"),
        ],
    )
    def test_bits_do_not_depend_on_the_slab(self, backend: str, R: int, k: int, size: int, dtype: str, ffn: str):
        E = 8
        rng = np.random.default_rng(R)
        case = Case.of(model(E, k, ffn), random_ids(rng, R, E, k), rng.permutation(E), E, dtype=dtype)
        whole = case.run(backend)
        for seed in range(3):
            np.testing.assert_array_equal(case.run_in_waves(backend, size, seed), whole)

    def test_a_row_alone_in_its_batch_or_not(self, backend: str):
        """Not promised bit for bit (blocks depend on the batch), but close, with dropped rows in between."""
        rng = np.random.default_rng(3)
        ids = random_ids(rng, 64, 8, 2)
        case = Case.of(model(8, 2), ids, rng.permutation(8), 8)
        whole = case.run(backend)
        ids = ids.copy()
        ids[1:] = 8
        alone = dataclasses.replace(case, ids=ids).run(backend)
        np.testing.assert_allclose(alone[0], whole[0], rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(alone[1:], 0)


class TestAuto:
    @pytest.mark.parametrize(("R", "chosen"), [(5, "loop"), (60, "blocks")])
    def test_goes_by_rows_per_expert_on_cpu(self, R: int, chosen: str):
        rng = np.random.default_rng(0)
        case = Case.of(model(4, 2), random_ids(rng, R, 4, 2), [2, 1, 3, 0], 4)
        np.testing.assert_array_equal(case.run("auto"), case.run(chosen))

    @pytest.mark.parametrize(("platform", "kernels"), [("cuda", 2), ("tpu", 0)])
    def test_is_triton_on_cuda_whatever_the_sizes(self, platform: str, kernels: int):
        config = model(4, 2, hidden=24)
        operands = abstract_operands(config, 5, 3, "bfloat16")
        assert Counts.of(export_for_cuda(OP, *operands, config=config, platform=platform)).kernels == kernels


class TestOnCuda:
    """What the op becomes where a loop or a conditional would make the host wait for the device."""

    @pytest.mark.parametrize("backend", [name for name, backend in BACKENDS.items() if backend.runs_on("cuda")])
    @pytest.mark.parametrize("R", [1, 8, 64, 512])
    def test_nothing_makes_the_host_wait(self, backend: str, R: int):
        config = model(8, 2, hidden=64, expert_hidden=96)
        operands = abstract_operands(config, R, 6, "bfloat16")
        counts = Counts.of(export_for_cuda(OP, *operands, config=config, backend=backend, platform="cuda"))
        assert (counts.traced_loops, counts.conditionals, counts.callbacks) == (0, 0, 0)
        assert counts.counted_loops == 0
        assert counts.kernels == (2 if backend == "triton" else 0)
        assert counts.sorts == (0 if R <= 64 and backend != "ragged" else counts.sorts)

    def test_others_are_refused(self):
        config = model(4, 2)
        for backend in ("loop", "blocks", "triton-interpreted"):
            with pytest.raises(ValueError, match=f"'{backend}' is made for cpu, not for cuda; choose one of triton, "):
                export_for_cuda(
                    OP, *abstract_operands(config, 5, 3, "float32"), config=config, backend=backend, platform="cuda"
                )


def test_a_backend_for_cuda_is_refused_on_a_cpu():
    case = Case.of(model(4, 2), [[0, 1]], [0, 1, 2, 3], 4)
    with pytest.raises(ValueError, match=r"'triton' is made for cuda, not for cpu; choose one of loop, blocks"):
        case.run("triton")


def compilations() -> int:
    return OP._cache_size()  # pyright: ignore[reportAttributeAccessIssue]


def temporary_bytes(config: ModelConfig, R: int, capacity: int, dtype: str = "float32", backend: str = "auto") -> int:
    """Of the compiled op on this machine."""
    operands = abstract_operands(config, R, capacity, dtype)
    analysis = OP.lower(*operands, config=config, backend=backend).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


class TestMemory:
    @pytest.mark.parametrize("capacity", [16, 128])
    @pytest.mark.parametrize("R", [1, 8, 512])
    def test_no_expert_is_copied(self, R: int, capacity: int):
        """Temporaries stay below one expert plus activations, however large the slab."""
        config = model(128, 2, hidden=1024, expert_hidden=2048)
        activations = R * config.top_k * (2 * config.hidden_size + 2 * config.expert_hidden) * 4
        assert temporary_bytes(config, R, capacity) < config.expert_params * 4 + activations

    @pytest.mark.parametrize("R", [8, 512])
    def test_no_expert_is_converted_in_bfloat16(self, R: int):
        config = model(16, 2, hidden=1024, expert_hidden=2048)
        activations = R * config.top_k * (2 * config.hidden_size + 2 * config.expert_hidden) * 4
        assert temporary_bytes(config, R, 16, "bfloat16") < config.expert_params * 2 + activations

    def test_long_contractions_are_not_copied_either(self):
        """Mixtral 8x7B's sizes: beyond what the compiler fuses in one piece."""
        config = model(8, 2, hidden=4096, expert_hidden=14336)
        assert temporary_bytes(config, 8, 4) < 4 << 20

    def test_gather_copies_a_few_experts_at_a_time(self, monkeypatch: pytest.MonkeyPatch):
        config = model(8, 2, hidden=1024, expert_hidden=2048)
        activations = 512 * 2 * (2 * config.hidden_size + 2 * config.expert_hidden) * 4
        assert temporary_bytes(config, 512, 6, backend="gather") < 1.1 * gather_module._COPY_BYTES + activations
        monkeypatch.setattr(gather_module, "_COPY_BYTES", 1)
        rng = np.random.default_rng(0)
        case = Case.of(model(5, 2), random_ids(rng, 7, 5, 2), random_slots(rng, 5, 4), 4)
        np.testing.assert_allclose(case.run("gather"), case.run("reference"), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("R", "weights_first"), [(30, True), (600, False)])
def test_blocks_of_few_rows_have_the_weights_as_left_factor(R: int, weights_first: bool):
    """What XLA:CPU makes of it: few rows are faster with the factors swapped, and XLA swaps them back if it can."""
    config = model(1, 1)
    text = OP.lower(*abstract_operands(config, R, 1, "float32"), config=config, backend="blocks").compile().as_text()
    size = 32 if weights_first else 256
    assert text is not None
    assert (f"f32[{F},{size}]{{1,0}} dot(" in text) == weights_first
    assert (f"f32[{size},{F}]{{1,0}} dot(" in text) != weights_first


def test_an_unknown_backend_is_named():
    case = Case.of(model(4, 2), [[0, 1]], [0, 1, 2, 3], 4)
    with pytest.raises(ValueError, match=r"'fast'.*loop, blocks"):
        case.run("fast")
