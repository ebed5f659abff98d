"""How long answers will be: `G` of eMoE eq. 3."""

from emoe_jax.requests.sequence import Sequence
from emoe_jax.tasks.profile import TaskProfile

RESET_SHARE = 0.05
"""A sequence that goes on beyond its expectation is expected to need this share of it once more (eMoE 1.5)."""
DEFAULT_TOKENS = 128.0
"""An answer of which nothing is known, before the first answers have ended."""
PROFILE_WEIGHT, DEFAULT_WEIGHT = 32.0, 2.0
"""How many observed answers the profile's mean, and the default, weigh as."""
MAX_TASKS = 64
"""Tasks with a mean of their own; clients may make up names."""
MEMORY = 256.0
"""Answers over which a task's mean is taken; older ones fade."""


class OutputLengths:
    """Mean answer length of each task: the profile's at first, what is observed later.

    Tasks of which nothing is known, and those beyond the first `MAX_TASKS`, share the mean of all answers.
    """

    def __init__(self, profile: TaskProfile | None = None, by_task: bool = True):
        """`by_task` False: all tasks share the mean of all answers."""
        self._by_task = by_task
        known = () if profile is None else [name for name, task in profile.tasks.items() if task.output_length]
        self._means: dict[str | None, tuple[float, float]] = {None: (DEFAULT_WEIGHT, DEFAULT_TOKENS)}
        if profile is not None and known:
            self._means[None] = (PROFILE_WEIGHT, profile.output_tokens(None, DEFAULT_TOKENS))
            for name in known if by_task else ():
                self._means[name] = (PROFILE_WEIGHT, profile.output_tokens(name, DEFAULT_TOKENS))

    def mean(self, task: str | None) -> float:
        """Tokens of an answer of a task; of all tasks where it has no mean of its own."""
        return self._means.get(task, self._means[None])[1]

    def expected(self, sequence: Sequence, max_model_len: int) -> float:
        """Tokens that a new sequence will generate, at least 1, within its own limits."""
        params = sequence.params
        room = min(params.max_tokens, max_model_len - len(sequence.prompt_token_ids))
        if params.ignore_eos and not (params.stop or params.stop_token_ids or params.ending_token_ids):
            return float(room)
        return max(1.0, min(float(room), self.mean(sequence.task)))

    def state(self) -> dict[str, float]:
        """Mean tokens of an answer per task, as JSON-able values."""
        return {name or "all": mean for name, (_, mean) in self._means.items()}

    def observe(self, sequence: Sequence) -> None:
        """An answer came to its end."""
        own = self._by_task and (sequence.task in self._means or len(self._means) <= MAX_TASKS)
        groups = {None, sequence.task} if own else {None}
        for group in groups:
            weight, mean = self._means.get(group, (DEFAULT_WEIGHT, self._means[None][1]))
            weight = min(weight + 1, MEMORY)
            self._means[group] = (weight, mean + (len(sequence.generated) - mean) / weight)


def remaining_tokens(expected: float, generated: int) -> float:
    """`G_i` of eMoE eq. 3: the expectation less what was generated; at 0, 5 % of the expectation again, and so on."""
    if generated < expected:
        return expected - generated
    again = max(1.0, RESET_SHARE * expected)
    return again - (generated - expected) % again
