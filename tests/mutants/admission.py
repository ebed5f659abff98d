"""Mutants of admission: eq. 3's dE, c and G, waiting for long."""

from tests.mutants.mutant import Mutant

_WIRING = "tests/engine/test_wiring_admission.py"
_LOADING = f"{_WIRING}::test_a_request_whose_experts_take_long_to_come_waits_for_a_deadline"
_STEPS = f"{_WIRING}::test_the_scheduler_learns_what_steps_take"
_LENGTHS = f"{_WIRING}::test_answers_are_expected_to_be_as_long_as_those_of_their_task"
_AGED = f"{_WIRING}::test_a_sequence_that_has_waited_for_long_goes_first"

_ADMISSION = "emoe_jax/residency/admission.py"
_LOADING_OF_PARTS = "emoe_jax/engine/loading.py"
_SLO = "emoe_jax/scheduling/slo.py"
_ESTIMATES = "emoe_jax/scheduling/estimates.py"

ADMISSION = (
    Mutant(
        "dE: engine",
        "the scheduler does not know how long experts take to load",
        _LOADING_OF_PARTS,
        "scheduler, known.profile, loading_seconds)",
        "scheduler, known.profile)",
        (f"{_LOADING}[exact]",),
    ),
    Mutant(
        "dE: exact",
        "under `exact` absent experts take no time",
        _ADMISSION,
        "                return wanted * stats.wait_seconds / stats.waited_loads\n",
        "                return 0.0\n",
        (f"{_LOADING}[exact]",),
    ),
    Mutant(
        "dE: resident",
        "under `resident` commits take no time",
        _ADMISSION,
        "        return missing * stats.commit_seconds / stats.loads\n",
        "        return 0.0\n",
        (f"{_LOADING}[resident]",),
    ),
    Mutant(
        "dE: scheduler",
        "loading time holds no admission back",
        _SLO,
        "guard.allows(choice, self._loading_seconds(choice))",
        "guard.allows(choice, 0.0)",
        (f"{_LOADING}[exact]",),
    ),
    Mutant(
        "c: steps",
        "the scheduler does not learn what a step takes",
        _ESTIMATES,
        "        self.model.observe(plan, seconds)\n",
        "",
        (_STEPS,),
    ),
    Mutant(
        "c: pace",
        "the scheduler does not learn what a token takes",
        _ESTIMATES,
        "            self.pace += PACE_MEMORY * (min(seconds, 10 * self.pace) - self.pace)\n",
        "",
        (_STEPS,),
    ),
    Mutant(
        "c: engine",
        "the policy is not told what steps took",
        "emoe_jax/scheduling/scheduler.py",
        "            self.policy.observe(plan, max(0.0, seconds - waited), waited)\n",
        "            pass\n",
        (_STEPS,),
    ),
    Mutant(
        "G: engine",
        "the scheduler does not know the task profile",
        _LOADING_OF_PARTS,
        "scheduler, known.profile, loading_seconds)",
        "scheduler, None, loading_seconds)",
        (_LENGTHS,),
    ),
    Mutant(
        "G: profile",
        "answers are not expected to be as long as the profile says",
        "emoe_jax/scheduling/registry.py",
        "OutputLengths(profile, by_task",
        "OutputLengths(None, by_task",
        (_LENGTHS,),
    ),
    Mutant(
        "G: learned",
        "the scheduler does not learn how long answers are",
        _SLO,
        "        self._estimates.lengths.observe(sequence)\n",
        "        pass\n",
        (_LENGTHS,),
    ),
    Mutant(
        "G: what is left",
        "an answer is expected to go on as long as when it began",
        _ESTIMATES,
        "return remaining_tokens(sequence.expected_tokens, len(sequence.generated))",
        "return remaining_tokens(sequence.expected_tokens, 0)",
        ("tests/scheduling/test_remaining.py::test_a_deadline_that_can_be_kept_in_the_end_is_protected_to_the_end",),
    ),
    Mutant(
        "aging",
        "a sequence never goes first for having waited",
        _SLO,
        "return now - since >= AGED * self.max_wait",
        "return False",
        (_AGED,),
    ),
    Mutant(
        "aging: start",
        "a sequence that has waited for long is foreseen first and not started first",
        _SLO,
        "            if self._is_aged(since, now):\n",
        "            if False:\n",
        (_AGED,),
    ),
    Mutant(
        "aging: line",
        "a sequence that has waited for long is started first and not foreseen first",
        _SLO,
        "[oldest] if self._is_aged(since, now) else []",
        "[]",
        (_AGED,),
    ),
)
