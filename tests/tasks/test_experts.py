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


@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_absent_experts_that_tokens_will_want(tokens: int):
    """Against draws of tokens that choose two of six experts each, about independently of each other."""
    rng = np.random.default_rng(0)
    routing = rng.dirichlet(np.full(6, 2.0), 3)
    routing = np.minimum(routing, 0.45) / np.minimum(routing, 0.45).sum(-1, keepdims=True)
    experts = TaskExperts(TaskProfile(3, 6, 2).with_task("a", routing=routing), [3, 3, 3])
    resident = rng.random((3, 6)) < 0.5
    chosen = rng.random((4000, tokens, 3, 6)) < 2 * routing
    wanted = (chosen.any(1) & ~resident).sum((1, 2)).mean()
    assert experts.wanted("a", tokens, resident) == pytest.approx(wanted, rel=0.02)
    assert experts.wanted("a", tokens, np.ones_like(resident)) == 0


def test_experts_of_insensitive_layers_are_missing_only_where_that_matters():
    routing = np.array([[0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1]])
    profile = TaskProfile(2, 4, 1).with_task("a", routing=routing, sensitivity=(0.0, 0.5))
    experts, nothing = TaskExperts(profile, [2, 1]), np.zeros((2, 4), bool)
    assert experts.missing("a", nothing) == 3
    assert experts.missing("a", nothing, sensitive=True) == 1


def test_unknown_tasks_need_nothing(experts: TaskExperts):
    resident = np.zeros((2, 4), bool)
    for task in ("c", "new", None):
        assert experts.missing(task, resident) == 0
    assert TaskExperts(None, [2, 1]).missing("a", resident) == TaskExperts(None, [2, 1]).wanted("a", 9, resident) == 0
