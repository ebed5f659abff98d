"""`python -m train.predictor.compare`: one table of architectures and variants, and its controls."""

import json

import numpy as np
import pytest
from rich.console import Console

from emoe_jax.predictor import Prompts
from emoe_jax.traces import RoutingTrace
from tests.traces.synthetic import make_trace
from train.predictor import compare
from train.predictor.examples import HeldOutSplit


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "trace.npz"
    make_trace(prompts=60).save(path)
    return path


def test_rows_are_judged_on_the_same_prompts(trace, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    argv = ["--traces", str(trace), "--arch", "gpt2", "--steps", "2", "--held-out", "0.2", "--json", str(out)]
    assert compare.main(argv) == 0
    numbers = json.loads(out.read_text())
    rows = numbers["rows"]
    assert list(rows) == ["prior alone", "ridge", "global frequency", "gpt2, all-layer", "gpt2, layer-by-layer"]
    assert numbers["prompts"] == 12
    assert rows["prior alone"]["coverage"]["0.5"] > rows["global frequency"]["coverage"]["0.5"]
    assert abs(rows["gpt2, all-layer"]["kl"] - rows["prior alone"]["kl"]) < 0.1  # two steps away from it
    assert rows["gpt2, all-layer"]["kl"] != rows["prior alone"]["kl"]
    assert "given_earlier_layers" in rows["gpt2, layer-by-layer"]
    assert "given_earlier_layers" not in rows["gpt2, all-layer"]
    assert "gpt2, layer-by-layer" in capsys.readouterr().out


def test_without_prior_networks_start_from_global_frequency(trace, monkeypatch):
    class Stopped(Exception):
        pass

    seen = []

    def stop(predictor, training, held_out, *rest):
        seen.append(held_out.priors[0])
        raise Stopped

    monkeypatch.setattr(compare.trainer, "run", stop)
    with pytest.raises(Stopped):
        compare.main(["--traces", str(trace), "--arch", "bert", "--variant", "all-layer", "--without-prior"])
    np.testing.assert_allclose(seen[0], np.broadcast_to(seen[0][:1], seen[0].shape))
    np.testing.assert_allclose(seen[0].sum(-1), 1, rtol=1e-5)


def test_shuffling_deals_the_training_prompts_routing_only():
    prompts = Prompts.of(make_trace(prompts=60), 4).routed()
    split = HeldOutSplit.draw(prompts, 0.2, 0)
    dealt = compare._shuffled(prompts, split, 0)
    np.testing.assert_array_equal(dealt.counts[split.held_out], prompts.counts[split.held_out])
    moved = (dealt.counts[split.train] != prompts.counts[split.train]).any((1, 2))
    assert moved.mean() > 0.8
    np.testing.assert_array_equal(dealt.counts.sum(0), prompts.counts.sum(0))


def test_shuffled_labels_fall_to_global_frequency(trace):
    options = compare.arguments(["--traces", str(trace), "--shuffle-labels", "--held-out", "0.3"])
    options.arch = []
    rows = compare.compare(RoutingTrace.load(trace), options, Console(quiet=True))["rows"]
    assert rows["prior alone"]["coverage"]["0.5"] < rows["global frequency"]["coverage"]["0.5"] + 0.03


def test_bad_input(trace, tmp_path, capsys):
    assert compare.main(["--traces", str(tmp_path / "none.npz")]) == 2
    assert "no such trace file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        compare.main(["--traces", str(trace), "--steps", "0"])
    assert caught.value.code == 2
    assert "--steps is 0" in capsys.readouterr().err
