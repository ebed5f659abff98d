"""Against transformers itself, where torch is installed (the `parity` extra): each loads what the other saves."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from emoe_jax.models import save_checkpoint
from tests.golden.tiny import CONFIGS, prompts, write_checkpoint
from tests.models.loaded import load

pytest.importorskip("torch", reason="needs the parity extra")
# Import notices of torch and transformers are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

NAMES = [
    "mixtral_llama3",
    "olmoe_options",
    "qwen2_windows",
    "qwen3_window",
    "glm4_groups",
    "granite_multipliers",
    "gpt_oss_windows",
    "deepseek_v2_groups",
    "deepseek_v3_groups",
    "glm4_lite_layers",
]
LENGTH = 48


@pytest.fixture(params=NAMES, scope="module")
def reference(request, tmp_path_factory):
    from tests.golden.make import load_transformers, transformers_logits

    raw = CONFIGS[request.param]
    model = load_transformers(write_checkpoint(tmp_path_factory.mktemp(request.param), raw))
    tokens = prompts(raw)
    return raw, model, tokens, transformers_logits(model, tokens)


def assert_same(directory, tokens, expected):
    padded = np.pad(tokens, ((0, 0), (0, LENGTH - tokens.shape[1])))
    model = load(directory)
    np.testing.assert_allclose(model.forward(padded)[0][:, : tokens.shape[1]], expected, atol=2e-4, rtol=0)
    return model


@pytest.mark.parametrize("original_format", [True, False])
def test_loads_what_transformers_saves(reference, original_format, tmp_path):
    """As on the hub by default, fused on request; its config.json differs from the hub's, too."""
    raw, model, tokens, expected = reference
    model.save_pretrained(tmp_path, save_original_format=original_format)
    assert_same(tmp_path, tokens, expected)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        names = list(file.keys())
    fused = any(name.endswith(".experts.gate_up_proj") for name in names)
    assert fused is (not original_format or raw["model_type"] == "gpt_oss")  # which has no other layout


def test_loads_its_shards(reference, tmp_path):
    _, model, tokens, expected = reference
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(tmp_path, tokens, expected)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_transformers_loads_what_we_save(reference, layout, tmp_path):
    from tests.golden.make import load_transformers, transformers_logits

    raw, _, tokens, expected = reference
    ours = load(write_checkpoint(tmp_path / "original", raw))
    save_checkpoint(tmp_path / "saved", raw, ours.state, ours.experts, layout)
    np.testing.assert_allclose(transformers_logits(load_transformers(tmp_path / "saved"), tokens), expected, atol=1e-5)


def test_cached_generation_agrees(reference):
    """transformers with its KV cache generates the golden tokens, which it computed without one."""
    import torch  # pyright: ignore[reportMissingImports]

    raw, model, tokens, _ = reference
    name = next(n for n in NAMES if CONFIGS[n] is raw)
    golden = np.load(Path(__file__).parent.parent / "golden" / f"{name}.npz")
    assert json.loads(str(golden["config"])) == raw
    prompt = torch.tensor(tokens[:1], dtype=torch.long)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # else a token that happens to be the pad id would be masked
        max_new_tokens=len(golden["greedy"]),
        do_sample=False,
        eos_token_id=None,
        use_cache=True,
    )
    assert out[0, tokens.shape[1] :].tolist() == golden["greedy"].tolist()
