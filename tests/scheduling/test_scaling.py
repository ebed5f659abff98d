from hypothesis import given
from hypothesis import strategies as st

from emoe_jax.scheduling.scaling import wanted_replicas

share = st.one_of(st.none(), st.floats(0, 1))


def test_the_worked_example():
    assert wanted_replicas(2, 12, 8, None, 0.95) == 1.5
    assert wanted_replicas(2, 12, 8, 0.96, 0.95) == 1.5
    assert wanted_replicas(2, 12, 8, 0.80, 0.95) == 3
    assert wanted_replicas(2, 80, 8, 0.80, 0.95) == 10


@given(st.integers(0, 50), st.floats(0, 1e4), st.floats(1, 100), share, st.floats(0, 1))
def test_missed_deadlines_never_remove_a_replica(running, unfinished, target, attainment, goal):
    wanted = wanted_replicas(running, unfinished, target, attainment, goal)
    assert wanted >= unfinished / target
    if attainment is not None and attainment < goal:
        assert wanted > running
