"""Logits and greedy tokens of every family against numbers that transformers computed (`tests/golden/make.py`)."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.golden.tiny import CONFIGS, write_checkpoint
from tests.models.loaded import load

GOLDEN = Path(__file__).parent.parent / "golden"
LENGTH = 48  # prompt and greedy tokens; all forwards share this shape


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("name", CONFIGS)
def test_matches_transformers(name, layout, tmp_path):
    golden = np.load(GOLDEN / f"{name}.npz")
    raw = json.loads(str(golden["config"]))
    assert raw == CONFIGS[name], "regenerate the golden numbers: python -m tests.golden.make"
    model = load(write_checkpoint(tmp_path, raw, layout))
    tokens = golden["tokens"]
    padded = np.pad(tokens, ((0, 0), (0, LENGTH - tokens.shape[1])))
    logits = model.forward(padded)[0][:, : tokens.shape[1]]
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-4, rtol=0)
    assert model.greedy(tokens[0], len(golden["greedy"]), LENGTH) == golden["greedy"].tolist()
