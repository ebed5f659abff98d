"""What requests are about: task types told by keywords, and what was profiled for each of them."""

from emoe_jax.tasks.classifier import TaskClassifier
from emoe_jax.tasks.profile import OTHER, Lengths, Task, TaskProfile

__all__ = ["OTHER", "Lengths", "Task", "TaskClassifier", "TaskProfile"]
