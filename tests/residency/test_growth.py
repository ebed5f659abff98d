"""What residency does before and after a step, as models get more layers and experts."""

import sys
from collections import Counter
from types import FrameType
from typing import Any

import numpy as np
import pytest

from emoe_jax.policies.regret import Regret
from emoe_jax.policies.rule import ExpectedWishes
from emoe_jax.residency.residency import Residency
from tests.experts.fake_reader import RECORD_FORMAT, FakeReader
from train.demo.shape import model_config

LIBRARY = "/emoe_jax/"
STEPS = 3
Calls = Counter[tuple[str, str]]


@pytest.mark.parametrize("policy", ["emoe", "lru"])
def test_no_work_of_a_step_is_done_layer_by_layer(policy: str) -> None:
    """Everything is due in every step. What is done for each layer or expert is inside one call of NumPy."""
    assert _calls(policy, layers=2, experts=8) == _calls(policy, layers=12, experts=32)


def _calls(policy: str, layers: int, experts: int) -> Calls:
    """Which functions of the library run in a few steps, and how often each calls NumPy and other C functions.
    Residents are what routers wish for, so that no expert moves.
    """
    config = model_config(num_hidden_layers=layers, num_local_experts=experts)
    now = iter(range(0, 1_000_000, 1000))
    options: dict[str, Any] = {"clock": lambda: float(next(now))}
    with Residency(config, RECORD_FORMAT, [4] * layers, FakeReader(), policy, **options) as residency:
        residency.fill()
        regret = Regret([4] * layers, experts, config.top_k, steps=100)
        counts = np.where(residency.table.resident_mask, 3, 0)
        rates = residency.table.resident_mask.astype(np.float32)
        calls: Calls = Counter()

        def count(frame: FrameType, event: str, argument: Any) -> None:
            if event in ("call", "c_call") and LIBRARY in frame.f_code.co_filename:
                calls[frame.f_code.co_qualname, getattr(argument, "__name__", "")] += 1

        for _ in range(STEPS):
            sys.setprofile(count)
            try:
                residency.commit()
                residency.plan(ExpectedWishes(rates, rates, 1.0, np.ones(layers, np.float32)))
                residency.table.device_table()
                residency.observe(counts, counts)
                regret.record(counts, counts, ["a"], residency.loads.loads)
            finally:
                sys.setprofile(None)
        assert residency.loads.loads == 4 * layers
    assert ("Residency.observe", "") in calls
    return calls
