"""The table of `next-layer-router`: learned, written, read, refused."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from emoe_jax.errors import ConfigError
from emoe_jax.policies.learning import learn_transitions
from emoe_jax.policies.rivals import MOST_MATRICES, activation_matrices
from emoe_jax.policies.transitions import load_transitions, save_transitions
from emoe_jax.traces import RoutingTrace
from tests.traces.synthetic import make_trace

M, E, TOP_K = 3, 8, 2


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return make_trace(prompts=10)


def test_transitions_are_shares_of_tokens(trace: RoutingTrace):
    chosen = (trace.experts[..., None] == np.arange(E)).any(2)  # [tokens, M, E]
    learned = learn_transitions(trace)
    for layer in range(M - 1):
        for expert in range(E):
            tokens = chosen[:, layer, expert]
            assert tokens.any()
            np.testing.assert_allclose(learned[layer, expert], chosen[tokens, layer + 1].mean(0), atol=2e-3)


def test_written_and_read_in_half_precision(trace: RoutingTrace, tmp_path: Path):
    path, learned = tmp_path / "transitions.npz", learn_transitions(trace)
    save_transitions(path, learned)
    read = load_transitions(path, M, E, TOP_K)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, learned, rtol=1e-3, atol=1e-6)


def test_a_model_of_one_moe_layer_has_no_transitions(tmp_path: Path):
    path, learned = tmp_path / "transitions.npz", learn_transitions(make_trace(prompts=4, layers=1))
    save_transitions(path, learned)
    assert load_transitions(path, 1, E, TOP_K).shape == (0, E, E)


def test_tables_of_other_models_and_damaged_ones_are_refused(trace: RoutingTrace, tmp_path: Path):
    path, good = tmp_path / "transitions.npz", learn_transitions(trace)

    def refusal() -> str:
        with pytest.raises(ConfigError) as caught:
            load_transitions(path, M, E, TOP_K)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "no such file" in refusal()
    save_transitions(path, good)
    whole = path.read_bytes()
    with pytest.raises(ConfigError, match=r"shape \[2, 8, 8\]; the model has 4 MoE layers of 8 experts"):
        load_transitions(path, 4, E, TOP_K)
    with pytest.raises(ConfigError, match="to 2 to 2 experts of the next layer; the model chooses 3"):
        load_transitions(path, M, E, 3)
    for damaged in (whole[:100], b"", b"not an archive"):
        path.write_bytes(damaged)
        assert "holds no transitions" in refusal()
    for table, message in (
        (np.full((2, E, E), np.nan), "no shares between 0 and 1"),
        (good - 0.5, "no shares between 0 and 1"),
        (1.5 * good, "no shares between 0 and 1" if (1.5 * good).max() > 1.01 else "experts of the next layer"),
        (0.5 * good, "experts of the next layer"),
    ):
        save_transitions(path, table)
        assert message in refusal()
    np.savez(path, transitions=good)
    assert "of type float32" in refusal()
    np.savez(path, other=good)
    assert "transitions is not a file in the archive" in refusal()
    np.savez(path, transitions=np.array([{}], object))
    assert "allow_pickle" in refusal()
    with path.open("wb") as file:
        np.save(file, good)
    assert "single array" in refusal()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("transitions.npy", b"\x93NUMPY")
    refusal()


def test_matrices_are_the_latest_prompts_that_have_routing():
    counts = np.zeros((MOST_MATRICES + 5, 1, 2), np.int32)
    counts[:, 0, 0], counts[:, 0, 1] = 1, np.arange(len(counts))
    counts[-1] = 0
    matrices = activation_matrices(counts)
    assert len(matrices) == MOST_MATRICES
    np.testing.assert_allclose(matrices[:, 0, 1] / matrices[:, 0, 0], np.arange(4, MOST_MATRICES + 4), rtol=1e-5)
