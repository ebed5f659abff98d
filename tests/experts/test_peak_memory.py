import sys
from pathlib import Path

import pytest

from benchmarks.loading import MODEL, measure_peak_rss

# 8 layers x 16 experts of 1.6 MB: 201 MB of experts.
SMALL = MODEL | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 1024}


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
