import pytest

from emoe_jax.device.layered import like_before_first


@pytest.mark.parametrize(
    ("moe_layers", "kinds", "expected"),
    [
        ([0, 1, 2], [0, 0, 0], 0),
        ([0, 1, 2, 3], [0, 1, 0, 1], 1),  # windows in every other layer
        ([1, 2], [0, 1, 1], 1),  # a dense layer first: nothing in the model is like it
        ([1, 3, 5], [0, 1, 0, 1, 0, 1], 1),  # dense ones between
        ([0], [0], 0),
    ],
)
def test_what_stands_before_the_first_router_shares_its_executable(
    moe_layers: list[int], kinds: list[int], expected: int
) -> None:
    assert like_before_first(moe_layers, kinds) == expected
