"""What a calibration finds in steps whose costs are known, and that it runs no model that it predicts."""

import math
from typing import Any

import numpy as np
import pytest

from benchmarks import calibration
from benchmarks.calibration import PROMPT_STEP, Sample, fitted, predicted, samples_of, shortened, with_costs, works_of
from benchmarks.peers import MODEL
from emoe_jax.checkpoint.files import CONFIG, read_json
from emoe_jax.demo import demo_model
from emoe_jax.models import config_from_hf
from emoe_jax.planning.roofline import Work
from emoe_jax.planning.targets import Costs
from tests.benchmarks.known_costs import COSTS, MACHINE

HOST = 4e-4
MODELS = (read_json(demo_model() / CONFIG), MODEL)


def taken(work: Work) -> float:
    return math.fsum(getattr(work, part) * cost for part, cost in COSTS.items())


def short_works() -> list[Work]:
    shorts = [config_from_hf(shortened(raw, part)) for raw in MODELS for part in calibration.SHORT]
    return [work for config in shorts for work in works_of(config).values()]


def test_exact_times_of_short_models_predict_the_whole_ones() -> None:
    target = with_costs(MACHINE, HOST, fitted([Sample(work, taken(work)) for work in short_works()]))
    for raw in MODELS:
        works = works_of(config_from_hf(raw))
        for what, seconds in predicted(works, target).items():
            exact = max(HOST, taken(works[what])) + (HOST if what == PROMPT_STEP else 0)
            assert seconds == pytest.approx(exact, rel=0.02)


def test_noise_of_five_percent_leaves_predictions_within_fifteen() -> None:
    noise = np.random.default_rng(0)
    samples = [Sample(work, taken(work) * noise.uniform(0.95, 1.05)) for work in short_works()]
    target = with_costs(MACHINE, HOST, fitted(samples))
    for raw in MODELS:
        for work in works_of(config_from_hf(raw)).values():
            assert work.device_seconds(target, "float32") == pytest.approx(taken(work), rel=0.15)


def test_no_cost_is_negative_even_where_that_would_fit_better() -> None:
    works = [Work(layers=layers, rows=1.0) for layers in (1.0, 2.0, 3.0)]
    found = fitted([Sample(work, 4.0 - work.layers) for work in works])
    assert found["layers"] == 0
    assert found["rows"] > 0
    assert found["choices"] == 0  # nothing was chosen


def test_a_machine_has_the_costs_and_reads_at_what_a_byte_takes() -> None:
    target = with_costs(MACHINE, HOST, COSTS)
    assert target.bandwidth == pytest.approx(1 / COSTS["memory_bytes"])
    assert target.costs == Costs(host=HOST, **{part: COSTS[part] for part in Costs._fields[1:]})
    assert target.link == MACHINE.link
    assert with_costs(MACHINE, HOST, COSTS | {"memory_bytes": 0.0}).bandwidth == math.inf


def test_steps_that_the_host_hides_say_nothing_of_the_device() -> None:
    works = works_of(config_from_hf(MODEL))
    one, eight, prompt = works
    found = samples_of(works, {one: 1.1, eight: 3.0, prompt: 10.0}, host=1.0)
    assert found == [Sample(works[eight], 3.0), Sample(works[prompt], 9.0)]


@pytest.mark.parametrize("raw", MODELS)
def test_what_is_run_has_other_depths_than_what_is_predicted(raw: dict[str, Any]) -> None:
    depths = [shortened(raw, part)["num_hidden_layers"] for part in calibration.SHORT]
    assert 0 < depths[0] < depths[1] < raw["num_hidden_layers"]
    assert shortened(raw | {"num_hidden_layers": 3}, 4)["num_hidden_layers"] == 1
