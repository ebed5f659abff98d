"""Whole forwards or stops at routers: whichever took less time for a shape."""

import pytest

from emoe_jax.device.shapes import Shape
from emoe_jax.device.ways import OVERLAP_BELOW, Way, Ways

SHAPE = Shape(sequences=4, decodes=4, tiles=0, tile=0, pages=4)
OTHER = Shape(sequences=4, decodes=4, tiles=1, tile=32, pages=4)


def play(ways: Ways, seconds: dict[Way, float], batches: int, shape: Shape = SHAPE) -> list[Way]:
    chosen = []
    for _ in range(batches):
        chosen.append(ways.choose(shape))
        ways.took(shape, chosen[-1], seconds[chosen[-1]], repeated=False)
    return chosen


@pytest.mark.parametrize("best", ["whole", "layered"])
def test_both_are_tried_and_the_quicker_one_is_kept(best: Way) -> None:
    chosen = play(Ways(), {"whole": 1.0, "layered": 1.0, best: 0.5}, 400)
    assert chosen[:2] == ["whole", "layered"]
    assert 0.95 < chosen.count(best) / 400 < 1


def test_each_shape_has_its_own_way() -> None:
    ways = Ways()
    play(ways, {"whole": 1.0, "layered": 2.0}, 10)
    play(ways, {"whole": 2.0, "layered": 1.0}, 10, OTHER)
    assert (ways.peek(SHAPE), ways.peek(OTHER)) == ("whole", "layered")


def test_what_changes_is_noticed() -> None:
    ways = Ways()
    play(ways, {"whole": 2.0, "layered": 1.0}, 20)
    chosen = play(ways, {"whole": 0.1, "layered": 1.0}, 2000)
    assert chosen[-1] == "whole"
    assert chosen.count("whole") > 1000


@pytest.mark.parametrize("best", ["whole", "layered"])
def test_a_first_time_that_compiles_is_forgotten(best: Way) -> None:
    ways = Ways()
    play(ways, {"whole": 30.0, "layered": 20.0}, 2)
    chosen = play(ways, {"whole": 1.0, "layered": 1.0, best: 0.5}, 1000)
    assert chosen[200:].count(best) > 780


def test_one_slow_batch_does_not_change_the_way() -> None:
    ways = Ways()
    play(ways, {"whole": 1.0, "layered": 1.5}, 20)
    ways.took(SHAPE, "whole", 5.0, repeated=False)
    assert ways.peek(SHAPE) == "whole"


def test_steps_overlap_while_few_forwards_are_repeated() -> None:
    ways = Ways()
    assert ways.overlaps
    for _ in range(5):
        ways.took(SHAPE, "whole", 1.0, repeated=True)
    assert not ways.overlaps
    for _ in range(100):
        ways.took(SHAPE, "whole", 1.0, repeated=False)
    assert ways.overlaps
    assert 0 < OVERLAP_BELOW < 1
