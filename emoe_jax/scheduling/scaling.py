"""How many replicas a load needs. A pure decision, as in `replicas`."""


def wanted_replicas(running: int, unfinished: float, target: float, attainment: float | None, goal: float) -> float:
    """By the queue, as many as have `target` unfinished requests each; by deadlines, one more while they are missed.

    `attainment` is the share of recent answers that kept their deadlines, None if none had any. While it is below
    `goal`, there is one replica more than the `running` ones, however short the queue is. Worked example: 2 replicas
    with 12 requests and a target of 8 need 1.5. They need 3 if 80 % of the deadlines are kept and 95 % are the goal.
    """
    by_queue = unfinished / target
    if attainment is not None and attainment < goal:
        return max(by_queue, running + 1.0)
    return by_queue
