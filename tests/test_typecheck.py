"""The library that the tests import is the one whose array annotations are checked."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from emoe_jax.attention.sums import attention_mask
from emoe_jax.moe.dispatch import slots_of
from emoe_jax.policies.learning import co_occurrences
from emoe_jax.predictor.prompts import frequencies

IDS = np.zeros((3, 2), np.int32)


@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [
        (co_occurrences, (IDS, IDS, 4), (IDS, IDS[:2], 4)),  # an axis that disagrees
        (slots_of, (jnp.asarray(IDS), jnp.zeros(4, jnp.int32), 4), (jnp.zeros((3, 2)), jnp.zeros(4, jnp.int32), 4)),
        (attention_mask, (jnp.asarray(IDS), jnp.zeros(5, jnp.int32), None), (jnp.asarray(IDS), jnp.asarray(IDS), None)),
        (frequencies, (np.ones((2, 4)),), ([[1, 2], [3, 4]],)),  # no array
    ],
)
def test_arrays_are_what_annotations_say(
    function: Callable[..., Any], right: tuple[Any, ...], wrong: tuple[Any, ...]
) -> None:
    function(*right)
    with pytest.raises(TypeCheckError):
        function(*wrong)
