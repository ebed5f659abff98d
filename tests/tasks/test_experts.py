import numpy as np
import pytest

from emoe_jax.tasks import TaskProfile
from emoe_jax.tasks.experts import TaskExperts


@pytest.fixture
def experts() -> TaskExperts:
    profile = TaskProfile(2, 4, 1)
    profile = profile.with_task("a", routing=np.array([[0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1]]))
    profile = profile.with_task("b", routing=np.array([[0.4, 0.1, 0.2, 0.3], [0.1, 0.1, 0.1, 0.7]]))
    return TaskExperts(profile.with_task("c"), [2, 1])


def test_hot_experts_are_the_most_frequent_ones(experts: TaskExperts):
    resident = np.zeros((2, 4), bool)
    assert experts.missing("a", resident) == experts.missing("b", resident) == 3
    resident[0, 0] = resident[1, 3] = True
    assert experts.missing("a", resident) == 2
    assert experts.missing("b", resident) == 1
    assert experts.missing("b", ~resident) == 2


def test_affinity_is_the_share_of_hot_experts_in_common(experts: TaskExperts):
    assert experts.affinity("a", "a") == 1
    assert experts.affinity("a", "b") == experts.affinity("b", "a") == pytest.approx(1 / 3)


def test_unknown_tasks_need_and_share_nothing(experts: TaskExperts):
    resident = np.zeros((2, 4), bool)
    for task in ("c", "new", None):
        assert experts.missing(task, resident) == experts.affinity(task, "a") == experts.affinity("a", task) == 0
    assert TaskExperts(None, [2, 1]).missing("a", resident) == 0
