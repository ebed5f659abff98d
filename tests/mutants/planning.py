"""Mutants of `emoe plan`: what counts in its times, whose memory it plans, and what it names."""

from tests.mutants.mutant import Mutant

_ROOFLINE = "tests/planning/test_roofline.py"
_FIT = "tests/planning/test_fit.py"
_COMMAND = "tests/serve/test_plan.py"

PLANNING = (
    Mutant(
        "plan: link",
        "a step does not wait for the experts that it loads",
        "emoe_jax/planning/roofline.py",
        " + self.link_bytes / target.link + ",
        " + ",
        (f"{_ROOFLINE}::test_an_absent_expert_is_loaded_written_and_read",),
    ),
    Mutant(
        "plan: host",
        "a step takes less than the host's work for it",
        "emoe_jax/planning/roofline.py",
        "return max(self.device_seconds(target, dtype), target.costs.host)",
        "return self.device_seconds(target, dtype)",
        (f"{_ROOFLINE}::test_the_host_works_behind_the_device_but_before_a_prompt",),
    ),
    Mutant(
        "plan: experts read again",
        "rows that share an expert cost no more than one of them",
        "emoe_jax/planning/roofline.py",
        "choices * self.record_bytes - visited if alone else 0.0",
        "0.0",
        (f"{_ROOFLINE}::test_rows_that_share_experts_by_hand",),
    ),
    Mutant(
        "start: compiled steps",
        "a server serves before its first steps are compiled",
        "serve/start.py",
        "            if not reads.all_found:\n",
        "            if False:\n",
        ("tests/serve/test_start.py::test_nothing_is_left_where_a_first_piece_had_to_be_compiled",),
    ),
    Mutant(
        "start: chores",
        "what is left of a warm-up is never done",
        "serve/worker.py",
        "                elif self._chores is not None:\n",
        "                elif False:\n",
        ("tests/serve/test_worker.py::test_a_request_that_comes_during_a_chore_is_answered_before_the_next_one",),
    ),
    Mutant(
        "plan: coverage at random",
        "a coverage below that of experts at random counts as it is",
        "emoe_jax/planning/roofline.py",
        "return max(self.slots / self.config.num_experts, wanted or 0.0)",
        "return wanted or 0.0",
        (f"{_ROOFLINE}::test_coverage_is_at_least_that_of_experts_at_random",),
    ),
    Mutant(
        "plan: windows",
        "a row reads all keys of a layer with a window",
        "emoe_jax/planning/roofline.py",
        "min(context, config.sliding_window(layer) or context)",
        "context",
        (f"{_ROOFLINE}::test_a_window_bounds_what_is_seen",),
    ),
    Mutant(
        "plan: batch",
        "sequences that have no room at once fit",
        "emoe_jax/planning/fit.py",
        "        if plan.num_pages - 1 < self.batch * pages_for(context):\n",
        "        if False:\n",
        (f"{_FIT}::test_what_does_not_fit_says_both_numbers_and_what_it_would_take",),
    ),
    Mutant(
        "plan: advice",
        "changes are named without being tried",
        "emoe_jax/planning/plan.py",
        "        if flags and does(other):\n",
        "        if flags:\n",
        (f"{_COMMAND}::test_advice_that_would_not_do_is_not_named",),
    ),
    Mutant(
        "plan: objectives",
        "the smallest card need not meet the objectives",
        "emoe_jax/planning/plan.py",
        "return fit.fits and speed_of(footprint, fit, card, load).meets(load)",
        "return fit.fits",
        (f"{_COMMAND}::test_objectives_choose_the_card_and_the_status",),
    ),
    Mutant(
        "slow lines",
        "the server does not say what will be slow",
        "serve/start.py",
        '        print(f"slow: {line}")\n',
        "        pass\n",
        ("tests/serve/test_process.py::test_tells_what_it_serves",),
    ),
)
