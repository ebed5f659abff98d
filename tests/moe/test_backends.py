"""Every backend of the MoE op against the reference, and what they promise beyond being right."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.moe import BACKENDS, moe_ffn
from tests.lowering import export_for_cuda

D, F = 32, 48
OP = jax.jit(moe_ffn, static_argnames=("config", "backend"))
WAVE_EXACT = [name for name, backend in BACKENDS.items() if backend.wave_exact]


def model(E: int, k: int, ffn: str = "glu", hidden: int = D, expert_hidden: int = F) -> ModelConfig:
    return ModelConfig(
        family="test",
        vocab_size=8,
        hidden_size=hidden,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_position=8,
        num_experts=E,
        top_k=k,
        expert_hidden=expert_hidden,
        moe_layers=(0,),
        activation="silu" if ffn == "glu" else "gelu",
        ffn=ffn,  # pyright: ignore[reportArgumentType]
    )


@dataclasses.dataclass
class Case:
    """One call of the op: all `E` experts' weights, and which slot of the slab each has (`C` when absent)."""

    config: ModelConfig
    rows: jax.Array
    ids: np.ndarray
    weights: jax.Array
    slots: np.ndarray
    capacity: int
    w_in: np.ndarray
    w_out: np.ndarray

    @classmethod
    def of(cls, config: ModelConfig, ids, slots, capacity: int, seed: int = 0, dtype="float32") -> "Case":
        rng = np.random.default_rng(seed)
        ids, slots = np.asarray(ids, np.int32), np.asarray(slots, np.int32)
        R, E = len(ids), config.num_experts
        return cls(
            config,
            jnp.asarray(rng.standard_normal((R, config.hidden_size)), dtype),
            ids,
            jnp.asarray(rng.uniform(0.1, 1.0, ids.shape), jnp.float32),
            slots,
            capacity,
            (rng.standard_normal((E, *config.expert_in_shape)) * 0.2).astype(dtype),
            (rng.standard_normal((E, *config.expert_out_shape)) * 0.2).astype(dtype),
        )

    def slab(self, slots: np.ndarray, capacity: int) -> ExpertWeights:
        """The experts at their slots; unused slots hold NaN, so that reading one cannot go unnoticed."""
        w_in = np.full((capacity, *self.w_in.shape[1:]), np.nan, self.w_in.dtype)
        w_out = np.full((capacity, *self.w_out.shape[1:]), np.nan, self.w_out.dtype)
        held = np.flatnonzero(slots < capacity)
        w_in[slots[held]], w_out[slots[held]] = self.w_in[held], self.w_out[held]
        return ExpertWeights(jnp.asarray(w_in), jnp.asarray(w_out))

    def run(self, backend: str, accumulator: jax.Array | np.ndarray | None = None) -> np.ndarray:
        slab = self.slab(self.slots, self.capacity)
        return np.asarray(
            OP(
                self.rows,
                self.ids,
                self.weights,
                self.slots,
                slab,
                accumulator=None if accumulator is None else jnp.asarray(accumulator),
                config=self.config,
                backend=backend,
            )
        )

    def run_in_waves(self, backend: str, size: int, seed: int) -> np.ndarray:
        """Chunks of `size` experts in ascending id through a slab of `size` slots, at random places."""
        rng = np.random.default_rng(seed)
        out = np.zeros_like(self.rows)
        for first in range(0, self.config.num_experts, size):
            experts = np.arange(first, min(first + size, self.config.num_experts))
            slots = np.full(self.config.num_experts, size, np.int32)
            slots[experts] = rng.permutation(size)[: len(experts)]
            wave = dataclasses.replace(self, slots=slots, capacity=size)
            out = wave.run(backend, accumulator=out)
        return out


def random_ids(rng: np.random.Generator, R: int, E: int, k: int) -> np.ndarray:
    return np.argsort(rng.random((R, E)), axis=1)[:, :k]


def random_slots(rng: np.random.Generator, E: int, C: int) -> np.ndarray:
    """`min(C, E)` experts resident, at random slots."""
    slots = np.full(E, C)
    resident = rng.permutation(E)[:C]
    slots[resident] = rng.permutation(C)[: len(resident)]
    return slots


SHAPES = [  # R, k, E, C, ffn
    (1, 1, 4, 4, "glu"),
    (3, 8, 8, 8, "double_glu"),
    (8, 2, 16, 5, "glu"),
    (70, 3, 64, 20, "double_glu"),
    (600, 2, 5, 3, "glu"),
]


@pytest.mark.parametrize("backend", BACKENDS)
class TestEveryBackend:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_matches_the_reference(self, backend: str, shape: tuple[int, int, int, int, str]):
        R, k, E, C, ffn = shape
        rng = np.random.default_rng(R)
        case = Case.of(model(E, k, ffn), random_ids(rng, R, E, k), random_slots(rng, E, C), C)
        np.testing.assert_allclose(case.run(backend), case.run("reference"), rtol=2e-5, atol=2e-5)

    def test_matches_the_reference_in_bfloat16(self, backend: str):
        rng = np.random.default_rng(0)
        case = Case.of(
            model(8, 2, "double_glu"), random_ids(rng, 40, 8, 2), random_slots(rng, 8, 6), 6, dtype="bfloat16"
        )
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

    def test_lowers_for_cuda(self, backend: str):
        config, R = model(8, 2), 200
        exported = export_for_cuda(OP, *abstract_operands(config, R, 6, "bfloat16"), config=config, backend=backend)
        assert exported.platforms == ("cuda",)
        assert ("xla.gpu.triton" in exported.mlir_module()) == (backend == "triton")


@pytest.mark.parametrize("backend", WAVE_EXACT)
class TestWaves:
    @pytest.mark.parametrize(
        ("R", "k", "size", "dtype"),
        [(1, 4, 4, "float32"), (40, 2, 3, "float32"), (40, 2, 2, "bfloat16"), (300, 2, 5, "float32")],
    )
    def test_bits_do_not_depend_on_the_slab(self, backend: str, R: int, k: int, size: int, dtype: str):
        E = 8
        rng = np.random.default_rng(R)
        case = Case.of(model(E, k), random_ids(rng, R, E, k), rng.permutation(E), E, dtype=dtype)
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

    @pytest.mark.parametrize(("hidden", "uses_triton"), [(32, True), (24, False)])
    def test_is_triton_on_cuda_where_it_fits(self, hidden: int, uses_triton: bool):
        config = model(4, 2, hidden=hidden)
        exported = export_for_cuda(OP, *abstract_operands(config, 5, 3, "bfloat16"), config=config)
        assert ("xla.gpu.triton" in exported.mlir_module()) == uses_triton


def compilations() -> int:
    return OP._cache_size()  # pyright: ignore[reportAttributeAccessIssue]


def temporary_bytes(config: ModelConfig, R: int, capacity: int, dtype: str = "float32") -> int:
    """Of the compiled op, as the `auto` backend chooses."""
    operands = abstract_operands(config, R, capacity, dtype)
    analysis = OP.lower(*operands, config=config).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def abstract_operands(config: ModelConfig, R: int, C: int, dtype: str):
    def array(shape, dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    experts = ExpertWeights(array((C, *config.expert_in_shape), dtype), array((C, *config.expert_out_shape), dtype))
    choice = (R, config.top_k)
    return (
        array((R, config.hidden_size), dtype),
        array(choice, jnp.int32),
        array(choice, jnp.float32),
        array((config.num_experts,), jnp.int32),
        experts,
    )


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


class TestTriton:
    def test_a_slab_beyond_32_bit_offsets_lowers(self):
        config = model(256, 2, hidden=4096, expert_hidden=14336)
        operands = abstract_operands(config, 16, 256, "bfloat16")
        exported = export_for_cuda(OP, *operands, config=config, backend="triton")
        assert "xla.gpu.triton" in exported.mlir_module()

    def test_sizes_it_cannot_tile(self):
        config = model(4, 2, hidden=24)
        case = Case.of(config, [[0, 1]], [0, 1, 2, 3], 4)
        with pytest.raises(NotImplementedError, match="divisible by 16, got 24 and 48"):
            case.run("triton")


def test_an_unknown_backend_is_named():
    case = Case.of(model(4, 2), [[0, 1]], [0, 1, 2, 3], 4)
    with pytest.raises(ValueError, match=r"'fast'.*loop, blocks"):
        case.run("fast")
