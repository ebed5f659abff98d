"""Half-precision checkpoints."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.tiny import CONFIGS, prompts, write_checkpoint
from tests.models.loaded import load

RAW = CONFIGS["mixtral_window"]


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_half_precision_weights_in_float32(dtype, layout, tmp_path, monkeypatch):
    """The file's numbers are taken as they are: the same answer as from a float32 file of the rounded numbers."""
    half = load(write_checkpoint(tmp_path / "half", RAW, layout, dtype))
    rounding = "tests.golden.tiny.random_tensor"
    from tests.golden import tiny

    original = tiny.random_tensor
    monkeypatch.setattr(rounding, lambda name, shape: original(name, shape).astype(dtype).astype(np.float32))
    rounded = load(write_checkpoint(tmp_path / "rounded", RAW, layout))
    tokens = np.pad(prompts(RAW), ((0, 0), (0, 32)))
    np.testing.assert_array_equal(half.forward(tokens)[0], rounded.forward(tokens)[0])


def test_computing_in_bfloat16(tmp_path):
    directory = write_checkpoint(tmp_path, RAW, dtype=jnp.bfloat16)
    tokens = np.pad(prompts(RAW), ((0, 0), (0, 32)))
    exact = load(directory).forward(tokens)[0]
    logits = load(directory, "bfloat16").forward(tokens)[0]
    assert logits.dtype == np.float32
    # A token whose router is undecided may take another expert, so only the bulk must agree.
    assert np.median(np.abs(logits - exact)) < 0.05
