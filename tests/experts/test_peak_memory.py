import sys
from pathlib import Path

import pytest

from benchmarks.loading import MODEL, measure_peak_rss

# 8 layers x 16 experts of 1.6 MB: 201 MB of experts.
SMALL = MODEL | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 1024}

# 8 layers x 16 experts of 1.6 million weights, in four bits.
PACKED = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "mxfp4"},
}


# The same in eight bits, with a scale for each block of 128 x 128.
BLOCKS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 1024,
    "hidden_size": 256,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_in_four_bits_makes_no_floats_of_them(tmp_path: Path):
    """Of all experts, which as float32 would take 805 MB."""
    (probe,) = measure_peak_rss(tmp_path, PACKED, ("100%",), "mxfp4")["peak_rss"]
    assert probe["slab_bytes"] == probe["expert_bytes"] < 0.14 * 805_306_368
    # The compiler takes most of it, with float experts too.
    assert probe["above_bytes"] < 200e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_in_fp8_makes_no_floats_of_them(tmp_path: Path):
    """Of half of the experts, which as float32 would take 101 MB."""
    (probe,) = measure_peak_rss(tmp_path, BLOCKS, ("50%",), "fp8")["peak_rss"]
    assert probe["expert_bytes"] == 2 * probe["slab_bytes"] < 0.26 * 201_326_592
    assert probe["above_bytes"] < 130e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_in_int8_holds_only_slab_dense_weights_and_a_few_experts(tmp_path: Path):
    """From a checkpoint in float32, of which the int8 slab is a quarter."""
    (probe,) = measure_peak_rss(tmp_path, SMALL, ("100%",), "int8")["peak_rss"]
    assert probe["slab_bytes"] == probe["expert_bytes"] < 0.26 * 201_326_592
    assert probe["above_bytes"] < 130e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_only_slab_and_dense_weights(tmp_path: Path):
    result = measure_peak_rss(tmp_path, SMALL, budgets=("50%",))
    (probe,) = result["peak_rss"]
    assert probe["expert_bytes"] == 2 * probe["slab_bytes"] == 201_326_592
    # At this size the loader's window of 64 MiB and what the runtime allocates by itself weigh more than at 1 GB.
    assert probe["above_bytes"] < 130e6
