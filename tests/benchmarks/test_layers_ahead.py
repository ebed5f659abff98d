"""What layers and chunks tell, on routing in which one layer follows from the one before."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.layers_ahead import main
from tests.traces.synthetic import make_trace


def test_loads_ahead_are_useful_where_a_layer_decides_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace = make_trace(prompts=24, layers=3, experts=12, tokens=140)
    free = np.random.default_rng(1).permuted(np.tile(np.arange(12, dtype=np.uint8), (trace.num_tokens, 1)), axis=1)
    first = free[:, : trace.top_k]
    experts = np.stack([first, (first + 5) % 12, trace.experts[:, 2]], axis=1)
    dataclasses.replace(trace, experts=experts.astype(np.uint8)).save(tmp_path / "trace.npz")
    assert main(["--trace", str(tmp_path / "trace.npz"), "--json", str(tmp_path / "out.json")]) == 0
    assert "loads ahead" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "out.json").read_text())
    by = {(row["share"], row["from"], row["certainty"]): row for row in numbers["loads"]}
    # Layer 1 follows from layer 0, layer 2 from neither: half of the places to look ahead are sure.
    told, untold = by[0.25, "ridge on tokens", 0.7], by[0.25, "given_layers", 0.7]
    assert told["useful"] > 0.95
    assert 0.3 < told["loads"] < 0.55
    assert untold["loads"] * (untold["useful"] or 0) < 0.1 * told["loads"]
    assert 0 < told["misses_spared"] < 1
    chunks = {(row["tokens"], row["by"]): row for row in numbers["chunks"]}
    assert set(chunks[16, "plan"]["coverage"]) == {"0.25", "0.5"}
    assert chunks[64, "plan"]["requests"] == 6
    assert (128, "plan") not in chunks  # no request has so many tokens and enough after them


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--trace", str(tmp_path / "none.npz")]) == 2
    error = capsys.readouterr().err
    assert "no such trace file" in error
    assert error.count("\n") == 1
