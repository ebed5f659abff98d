"""The task profile: what is written comes back, what is wrong is told in one line."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe_jax.errors import ConfigError
from emoe_jax.models import config_from_hf
from emoe_jax.requests.request import SLO
from emoe_jax.tasks import Lengths, TaskProfile
from tests.engines import TINY

CONFIG = config_from_hf(TINY)  # 3 MoE layers of 8 experts, top-2


def full_profile() -> TaskProfile:
    routing = np.random.default_rng(0).dirichlet(np.ones(8), size=3)
    profile = TaskProfile.empty(CONFIG).with_task("qa", keywords={"answer the": 5.5, "question": 2.25})
    profile = profile.with_task("qa", output_length=Lengths.of([1, 2, 3, 10]), sensitivity=(0.0, 0.5, 1.0))
    profile = profile.with_task("qa", routing=routing, slo=SLO(ttft_ms=200), prompts=4, tokens=99)
    return profile.with_task("sum", keywords={"summary": 4.0})


def raw_profile() -> dict[str, Any]:
    return full_profile()._raw()


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved = full_profile()
    saved.save(tmp_path / "profile.json")
    loaded = TaskProfile.load(tmp_path / "profile.json")
    assert list(tmp_path.iterdir()) == [tmp_path / "profile.json"]
    assert (loaded.num_layers, loaded.num_experts, loaded.top_k) == (3, 8, 2)
    assert loaded.threshold == saved.threshold
    assert loaded.tasks["sum"].output_length is None
    assert loaded.tasks["sum"].sensitivity is None
    assert loaded.tasks["sum"].slo is None
    ours, theirs = saved.tasks["qa"], loaded.tasks["qa"]
    assert theirs.slo == SLO(ttft_ms=200)
    assert ours.routing is not None
    assert theirs.routing is not None
    np.testing.assert_allclose(theirs.routing, ours.routing, atol=1e-6)
    assert (theirs.keywords, theirs.output_length, theirs.sensitivity, theirs.prompts, theirs.tokens) == (
        ours.keywords,
        ours.output_length,
        ours.sensitivity,
        4,
        99,
    )


def test_unknown_tasks_get_what_is_known_of_all() -> None:
    profile = full_profile()
    assert profile.output_tokens("qa", 7.0) == 4.0
    assert profile.output_tokens("other", 7.0) == 4.0
    assert TaskProfile.empty(CONFIG).output_tokens(None, 7.0) == 7.0
    assert profile.sensitivity("qa").tolist() == [0.0, 0.5, 1.0]
    assert profile.sensitivity(None).tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_array_equal(profile.frequency("sum"), profile.frequency("qa"))
    np.testing.assert_array_equal(TaskProfile.empty(CONFIG).frequency("qa"), np.full((3, 8), 1 / 8))


def test_a_profile_of_another_model_is_refused() -> None:
    full_profile().check(CONFIG)
    with pytest.raises(ConfigError, match=r"3 MoE layers of 8 experts, top-2; this model has 3 of 8, top-1"):
        full_profile().check(CONFIG.replace(top_k=1))


def changed(*keys: Any, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw_profile())
    place: Any = raw
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return raw


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ([], "the profile is list"),
        ({}, "version is None; this program reads version 1"),
        (changed("version", value=2), "version is 2"),
        (changed("model", value=None), "model is missing"),
        (changed("model", "num_experts", value=8.0), r"model.num_experts is 8.0; it must be an integer"),
        (changed("model", "top_k", value=9), "model.top_k is 9 of only 8 experts"),
        (changed("model", "num_layers", value=4), "sensitivity must be a list of 4 numbers"),
        (changed("threshold", value="high"), "threshold is high; it must be a number of at least 0"),
        (changed("tasks", value=[]), "tasks is list"),
        (changed("tasks", "other", value={}), "'other' cannot be the name of a task"),
        (changed("tasks", "qa", value=3), "tasks.qa is int"),
        (changed("tasks", "qa", "keywords", value={"a b c d e": 1.0}), "is not one to 4 words"),
        (changed("tasks", "qa", "keywords", "question", value=-1), "it must be a number of at least 0"),
        (changed("tasks", "qa", "keywords", "question", value=True), "is True"),
        (
            changed("tasks", "qa", "sensitivity", 1, value=1.5),
            r"sensitivity\[1\] is 1.5; it must be a number between 0",
        ),
        (changed("tasks", "qa", "routing", 0, value=[1, 1, 0, 0, 0, 0, 0, 0]), "a layer sums to 2.000"),
        (changed("tasks", "qa", "routing", 0, value=[1]), r"routing\[0\] must be a list of 8 numbers"),
        (changed("tasks", "qa", "output_length", "count", value=0), "output_length.count is 0"),
        (changed("tasks", "qa", "output_length", "quantiles", "0.9", value=0.5), "quantiles must not fall"),
        (changed("tasks", "qa", "output_length", "quantiles", value={}), r"quantiles\[0.1\] is None"),
        (
            changed("tasks", "qa", "slo", value={"ttft": 5}),
            "qa.slo has 'ttft'; it can have latency_ms, strict, ttft_ms",
        ),
        (changed("tasks", "qa", "slo", value={"ttft_ms": -1}), r"qa.slo: ttft_ms is -1; expected a number in \(0"),
        (changed("tasks", "qa", "slo", value=7), "qa.slo is int; it must be a JSON object"),
    ],
)
def test_bad_content_is_told_in_one_line(tmp_path: Path, raw: Any, match: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=match) as caught:
        TaskProfile.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", '{"version": NaN}', "\xff\xfe", "[" * 100_000, '{"threshold": 1e999}'])
def test_what_is_not_json_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        TaskProfile.load(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        TaskProfile.load(tmp_path / "missing.json")
    with pytest.raises(ConfigError, match="Is a directory"):
        TaskProfile.load(tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        full_profile().save(tmp_path / "missing" / "profile.json")
    with pytest.raises(ConfigError, match="'other'"):
        full_profile().with_task("other")
