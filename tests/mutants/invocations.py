"""Mutants of periodic invocation: which prompts are asked about, when, and what comes of it."""

from tests.mutants.mutant import Mutant

_ENGINE = "tests/residency/test_periodic.py"
_PLANNER = "tests/residency/test_invocations.py"
_BURST = f"{_ENGINE}::test_a_burst_of_prompts_has_one_prediction_in_p[options1-4]"
_IDLE = f"{_ENGINE}::test_an_idle_engine_waits_for_the_prediction_of_a_prompt_and_a_busy_one_does_not[True]"
_AUTO = f"{_PLANNER}::test_auto_asks_more_rarely_what_costs_more_than_it_gains_and_more_often_what_pays"

INVOCATIONS = (
    Mutant(
        "admit",
        "the planner is not told of prompts that start or are next in line",
        "emoe_jax/residency/foresight.py",
        "            self._admit(plan, scheduler)\n",
        "            pass\n",
        (_BURST,),
    ),
    Mutant(
        "line",
        "prompts that wait are not asked about before they start",
        "emoe_jax/residency/foresight.py",
        "self._planner.admit([*starting, *line])",
        "self._planner.admit(starting)",
        (f"{_ENGINE}::test_prompts_are_asked_about_before_they_start",),
    ),
    Mutant(
        "line in order of start",
        "the line is that of arrival, not that in which the policy will start sequences",
        "emoe_jax/scheduling/scheduler.py",
        "self.policy.next_up(count, now)",
        "list(self.policy.waiting)",
        (f"{_ENGINE}::test_p_counts_prompts_as_they_are_admitted",),
    ),
    Mutant(
        "await_forecasts",
        "an idle engine does not wait for the prediction of a prompt",
        "emoe_jax/residency/foresight.py",
        "            self._planner.await_forecasts("
        "dict.fromkeys(sequence.request_id for sequence in plan.sequences), wait)\n",
        "",
        (_IDLE,),
    ),
    Mutant(
        "waited_seconds",
        "the wait for predictions counts as computing time",
        "emoe_jax/residency/foresight.py",
        "return self._residency.waited_seconds + self._awaited\n",
        "return self._residency.waited_seconds\n",
        (_IDLE,),
    ),
    Mutant(
        "computed",
        "the planner is not told how long steps computed",
        "emoe_jax/residency/foresight.py",
        "self._planner.computed(seconds)",
        "self._planner.computed(0.0)",
        (_BURST,),
    ),
    Mutant(
        "p",
        "every prompt is asked about, whatever p is",
        "emoe_jax/residency/invocations.py",
        "if self._since and self._since < self.every:",
        "if self._since and self._since < 1:",
        (_BURST,),
    ),
    Mutant(
        "counted once",
        "a request that is in line and then starts counts twice",
        "emoe_jax/residency/invocations.py",
        "            request.admitted = True\n",
        "",
        (f"{_PLANNER}::test_prompts_are_counted_as_they_are_admitted_not_as_they_came",),
    ),
    Mutant(
        "withdraw",
        "the question about an aborted prompt is not taken back",
        "emoe_jax/residency/invocations.py",
        "if self.forecaster.withdraw(request.number):",
        "if request.number < 0:",
        (f"{_PLANNER}::test_an_aborted_prompt_passes_its_turn_on",),
    ),
    Mutant(
        "never_started",
        "prompts that were aborted before they started count for p",
        "emoe_jax/residency/planner.py",
        "                self.invocations.never_started(request)\n",
        "                pass\n",
        (f"{_PLANNER}::test_prompts_that_never_started_do_not_count",),
    ),
    Mutant(
        "cadence",
        "`auto` asks about every prompt for ever",
        "emoe_jax/residency/invocations.py",
        "return self.cadence.every if self._fixed is None else self._fixed",
        "return 1 if self._fixed is None else self._fixed",
        (_AUTO,),
    ),
    Mutant(
        "cadence knows the cost",
        "`auto` does not learn what a prediction costs",
        "emoe_jax/residency/invocations.py",
        "            self.cadence.predicted(forecast.seconds, len(forecast.shares))\n",
        "",
        (_AUTO,),
    ),
    Mutant(
        "cadence knows the gain",
        "`auto` does not learn what a prediction gains",
        "emoe_jax/residency/planner.py",
        "self.invocations.cadence.judged(predicted - frequency)",
        "pass",
        (_AUTO,),
    ),
    Mutant(
        "cadence counts prompts",
        "`auto` does not learn how long a prompt computes",
        "emoe_jax/residency/planner.py",
        "            self.invocations.cadence.ended()\n",
        "            pass\n",
        (_AUTO,),
    ),
    Mutant(
        "learning after the answer",
        "the predictor learns from a prompt before it predicts it",
        "emoe_jax/residency/planner.py",
        "if not request.unanswered:",
        "if True:",
        (f"{_PLANNER}::test_a_prompt_that_ends_before_its_answer_is_predicted_and_learned_from_afterwards",),
    ),
    Mutant(
        "batches",
        "questions that wait together are asked one by one",
        "emoe_jax/residency/forecaster.py",
        "[*self._questions][: BATCHES[-1]]",
        "[*self._questions][:1]",
        (f"{_PLANNER}::test_prompts_that_wait_are_asked_about_together",),
    ),
    Mutant(
        "one_forecast",
        "under `emoe-paper` a forecast serves its own task only",
        "emoe_jax/residency/knowledge.py",
        "one_forecast=kind.one_forecast",
        "one_forecast=False",
        (f"{_ENGINE}::test_under_the_papers_policy_a_forecast_serves_prompts_of_other_tasks",),
    ),
    Mutant(
        "kind.predict_every",
        "`emoe-paper` chooses p by itself",
        "emoe_jax/residency/knowledge.py",
        'predict_every = kind.predict_every or "auto"',
        'predict_every = "auto"',
        (f"{_ENGINE}::test_by_default_p_follows_cost_and_gain_and_the_papers_policy_keeps_to_40",),
    ),
)
