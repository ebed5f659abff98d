"""What is left of an answer, and not its whole length, is held against deadlines."""

from tests.scheduling.test_slo import Machine


def test_a_deadline_that_can_be_kept_in_the_end_is_protected_to_the_end():
    """After 90 of 100 tokens there is time to spare, but not for the other's prompt."""
    machine = Machine(budget=4000)
    machine.add("tight", tokens=100, latency=1.45)
    for _ in range(90):
        machine.step()
    machine.add("relaxed", prompt=3900, tokens=3, latency=60)
    machine.run()
    assert machine.started == ["tight", "relaxed"]
    assert machine.ended["tight"] <= 1.45
    assert machine.scheduler.attainment.total.attained == 2
