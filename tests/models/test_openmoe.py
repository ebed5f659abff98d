"""OpenMoE against an independent NumPy model, and against the published code's numbers where those are present."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.golden import openmoe_numpy
from tests.golden.tiny import OPENMOE, write_checkpoint
from tests.models.loaded import load

GOLDEN = Path(__file__).parent.parent / "golden" / "openmoe.npz"
PUBLISHED = Path(os.environ.get("EMOE_GOLDEN", "../shared/golden")) / "openmoe_tiny"
LENGTH = 48

needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published model's numbers are not here")


def pad(tokens):
    return np.pad(tokens, ((0, 0), (0, LENGTH - tokens.shape[1])))


def ids(routings, shape):
    """Experts that served each choice, `[M, B, T, k]`; `E` where the choice was dropped."""
    return np.stack([np.asarray(r.ids).reshape(*shape, -1) for r in routings])


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_matches_the_numpy_model(layout, tmp_path):
    golden = np.load(GOLDEN)
    raw = json.loads(str(golden["config"]))
    assert raw == OPENMOE, "regenerate the golden numbers: python -m tests.golden.make"
    model = load(write_checkpoint(tmp_path, raw, layout))
    tokens, T = golden["tokens"], golden["tokens"].shape[1]
    logits, routings = model.forward(pad(tokens))
    np.testing.assert_allclose(logits[:, :T], golden["logits"], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(ids(routings, (2, LENGTH))[:, :, :T], golden["chosen"])
    assert model.greedy(tokens[0], len(golden["greedy"]), LENGTH) == golden["greedy"].tolist()
    np.testing.assert_allclose(model.hidden_states(pad(tokens))[:, :, :T], golden["hidden"], atol=1e-4, rtol=1e-4)


def test_dropping_is_an_option(tmp_path):
    golden = np.load(GOLDEN)
    model = load(write_checkpoint(tmp_path, OPENMOE), router_capacity_factor=float(golden["drop_factor"]))
    tokens, T = golden["tokens"], golden["tokens"].shape[1]
    # Padding must not take part, so that the answer does not depend on it.
    valid = np.broadcast_to(np.arange(LENGTH) < T, (2, LENGTH))
    logits, routings = model.forward(pad(tokens), valid)
    np.testing.assert_allclose(logits[:, :T], golden["drop_logits"], atol=1e-4, rtol=0)
    expected = np.where(golden["drop_kept"], golden["drop_chosen"], OPENMOE["num_experts"])
    np.testing.assert_array_equal(ids(routings, (2, LENGTH))[:, :, :T], expected)


@needs_published
class TestPublished:
    def test_forward(self):
        golden = np.load(PUBLISHED / "golden.npz")
        model = load(PUBLISHED)
        tokens, mask = golden["input_ids"], golden["attention_mask"].astype(bool)
        logits, routings = model.forward(tokens)
        np.testing.assert_allclose(logits[mask], golden["logits"][mask], atol=1e-4, rtol=0)
        hidden = model.hidden_states(tokens)
        np.testing.assert_allclose(hidden[:, mask], golden["hidden_states"][:, mask], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(ids(routings, tokens.shape)[:, mask], golden["expert_index"][:, mask])
        for name, field in (("router_logits", "logits"), ("expert_weight", "weights")):
            ours = np.stack([np.asarray(getattr(r, field)).reshape(*tokens.shape, -1) for r in routings])
            np.testing.assert_allclose(ours[:, mask], golden[name][:, mask], atol=1e-4, rtol=0)
        assert model.greedy(golden["greedy_prompt"], 16, 24) == golden["greedy_tokens"].tolist()

    @pytest.mark.parametrize("kind", ["drop", "dropb"])
    def test_dropping(self, kind):
        golden = np.load(PUBLISHED / "golden.npz")
        model = load(PUBLISHED, router_capacity_factor=float(golden["drop_capacity_factor_eval"]))
        tokens = golden[f"{kind}_input_ids"]
        logits, routings = model.forward(tokens)
        np.testing.assert_allclose(logits, golden[f"{kind}_logits"], atol=1e-4, rtol=0)
        expected = np.where(golden[f"{kind}_expert_kept"], golden[f"{kind}_expert_index"], 8)
        np.testing.assert_array_equal(ids(routings, tokens.shape), expected)

    def test_numpy_model(self):
        """The independent model that the golden numbers come from is itself right."""
        golden = np.load(PUBLISHED / "golden.npz")
        raw = json.loads((PUBLISHED / "config.json").read_text())
        tensors = load_file(PUBLISHED / "model.safetensors")
        dropped = openmoe_numpy.forward(raw, tensors, golden["dropb_input_ids"], capacity_factor=0.5)
        np.testing.assert_allclose(dropped.logits, golden["dropb_logits"], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(dropped.kept, golden["dropb_expert_kept"])

    def test_short_config_names(self, tmp_path):
        """Configurations of older uploads describe the same model."""
        raw = json.loads((PUBLISHED / "config.json").read_text())
        short = {
            "topk": raw.pop("router_topk"),
            "capacity_factor_train": raw.pop("router_capacity_factor_train"),
            "capacity_factor_eval": raw.pop("router_capacity_factor_eval"),
            "min_capacity": raw.pop("router_min_capacity"),
            "noisy_policy": raw.pop("router_noisy_policy"),
            "drop_tks": raw.pop("router_drop_tks"),
            "gated": raw.pop("mlp_gated"),
        }
        for absent in ("num_key_value_heads", "rms_norm_eps"):
            del raw[absent]
        (tmp_path / "config.json").write_text(json.dumps(raw | short))
        shutil.copy(PUBLISHED / "model.safetensors", tmp_path)
        assert load(tmp_path).checkpoint.config == load(PUBLISHED).checkpoint.config
