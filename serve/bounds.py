"""Bounds of request fields, as `SamplingParams` states them, for pydantic."""

from typing import Any

from pydantic import Field

from emoe_jax.option_fields import Bounds
from emoe_jax.requests.request import SAMPLING_BOUNDS


def within(bounds: Bounds) -> Any:
    """The metadata of a number within these bounds."""
    if bounds.open_low:
        return Field(gt=bounds.low, le=bounds.high)
    return Field(ge=bounds.low, le=bounds.high)


def sampling(name: str) -> Any:
    """The metadata of a number that becomes this field of `SamplingParams`."""
    return within(SAMPLING_BOUNDS[name][0])
