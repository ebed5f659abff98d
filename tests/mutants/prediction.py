"""Mutants of what is known of prompts: predictor, embedding, history, drift, gate, eq. 2."""

from tests.mutants.mutant import Mutant

_WIRING = "tests/engine/test_wiring.py"
_EMBEDDING = f"{_WIRING}::test_residents_are_those_predicted_by_the_prompts_embedding"
_HISTORY = f"{_WIRING}::test_a_prediction_goes_by_the_prompts_that_ran_before"
_TOKENS = "tests/residency/test_reading_prompts.py::test_the_predictor_sees_the_tokens_of_every_prompt[True]"
_DRIFT = f"{_WIRING}::test_low_coverage_asks_early"
_GATE = f"{_WIRING}::test_predictions_that_are_worse_than_frequency_do_not_count"
_PLAN = f"{_WIRING}::test_a_plan_is_equation_2_of_the_requests_at_hand"

_KNOWLEDGE = "emoe_jax/residency/knowledge.py"
_FORESIGHT = "emoe_jax/residency/foresight.py"
_PLANNER = "emoe_jax/residency/planner.py"
_FORECASTER = "emoe_jax/residency/forecaster.py"
_DEMAND = "emoe_jax/residency/demand.py"

PREDICTION = (
    Mutant(
        "predictor",
        "the engine's planner has no predictor",
        _KNOWLEDGE,
        'predictor = self.predictor if forecast == "prompt" else None',
        "predictor = None",
        (_EMBEDDING,),
    ),
    Mutant(
        "predictor counts",
        "the predictor is asked, and prompts are planned without its word",
        _PLANNER,
        "predicted = self.forecast_of(request) if self._counts else None",
        "predicted = None",
        (_EMBEDDING,),
    ),
    Mutant(
        "own prediction",
        "a prompt is planned with its task's newest prediction, not with its own",
        _PLANNER,
        "return self._by_task.get(request.task) if request.predicted is None else request.predicted",
        "return self._by_task.get(request.task)",
        (
            "tests/residency/test_invocations.py"
            "::test_a_prompt_keeps_its_own_prediction_when_another_of_its_task_is_predicted",
        ),
    ),
    Mutant(
        "embedding: engine",
        "the planner is not told of prompts' embeddings",
        "emoe_jax/engine/arrivals.py",
        "foresight.arrived(sequences[0], embedding)",
        "foresight.arrived(sequences[0], None)",
        (_EMBEDDING,),
    ),
    Mutant(
        "embedding: planner",
        "the predictor is asked without the prompt's embedding",
        _PLANNER,
        "PlannedRequest(task, embedding, demand, tokens)",
        "PlannedRequest(task, None, demand, tokens)",
        (_EMBEDDING,),
    ),
    Mutant(
        "embedding: predictor",
        "the prior does not look at embeddings",
        "emoe_jax/predictor/kernel.py",
        "        if left.at:\n",
        "        if False:\n",
        (_EMBEDDING,),
    ),
    Mutant(
        "embedding: learning",
        "the predictor learns from prompts without their embeddings",
        _FORECASTER,
        "self._predictor.observe(prompt.task, prompt.counts, prompt.embedding)",
        "self._predictor.observe(prompt.task, prompt.counts)",
        (_HISTORY,),
    ),
    Mutant(
        "tokens: engine",
        "the planner is not told of prompts' tokens",
        _FORESIGHT,
        "read = tokens if self._planner.reads_tokens else ()",
        "read = ()",
        (_TOKENS,),
    ),
    Mutant(
        "tokens: planner",
        "the predictor is asked without the prompt's tokens",
        _PLANNER,
        "PlannedRequest(task, embedding, demand, tokens)",
        "PlannedRequest(task, embedding, demand)",
        (_TOKENS,),
    ),
    Mutant(
        "tokens: predictor",
        "the predictor does not read tokens",
        "emoe_jax/predictor/predictor.py",
        "return self.tokens.predict(prompts.tokens, prior, with_first)",
        "return prior",
        (_TOKENS,),
    ),
    Mutant(
        "history: told",
        "the predictor is not told of prompts that have run",
        _PLANNER,
        "            self.invocations.tell(request)\n",
        "            pass\n",
        (_HISTORY,),
    ),
    Mutant(
        "history: kept",
        "the predictor keeps no history",
        "emoe_jax/predictor/predictor.py",
        "        self.history = self.history.after(counts)\n",
        "",
        (_HISTORY,),
    ),
    Mutant(
        "history: looked at",
        "predictions are made as if no prompt had come before",
        "emoe_jax/predictor/predictor.py",
        "return self.predict_many(coming, [self.history] * rows, with_first=False)[: len(prompts)]",
        "return self.predict_many(coming, [History.empty(*self.inputs.centre.shape)] * rows, False)[: len(prompts)]",
        (_HISTORY,),
    ),
    Mutant(
        "network",
        "the predictor is the prior alone",
        "emoe_jax/predictor/predictor.py",
        "        if self.weights is None or not self.config.members:\n            return start\n",
        "        if True:\n            return start\n",
        (_HISTORY,),
    ),
    Mutant(
        "refit",
        "the prior never learns from prompts that have run",
        _FORECASTER,
        "        self._predictor.refit()\n",
        "",
        ("tests/residency/test_planner.py::test_learning_takes_a_small_share_of_the_time",),
    ),
    Mutant(
        "frequency",
        "tasks keep their profiled frequencies",
        _PLANNER,
        "        self._frequencies.observe(request.task, request.counts)\n",
        "",
        ("tests/residency/test_planner.py::test_without_a_predictor_a_task_follows_its_decayed_frequency",),
    ),
    Mutant(
        "drift: told",
        "the planner is not told of what the residents covered",
        _FORESIGHT,
        "                self._planner.observe(covered.wishes, covered.resident, covered.steps)\n",
        "                pass\n",
        (_DRIFT,),
    ),
    Mutant(
        "drift: promise",
        "coverage is held against no promise",
        _PLANNER,
        "        self.drift.promise(self._promised(rates))\n",
        "",
        (_DRIFT,),
    ),
    Mutant(
        "drift: asks",
        "low coverage asks about no prompt",
        _PLANNER,
        "            self.invocations.ask_early(self._known(self.planned))\n",
        "",
        (_DRIFT,),
    ),
    Mutant(
        "gate: told",
        "predictions are never held against frequency",
        _PLANNER,
        "            self.gate.observe(predicted, frequency)\n",
        "",
        (_GATE,),
    ),
    Mutant(
        "gate: counts",
        "predictions count however bad they are",
        _PLANNER,
        "return self._one_forecast or self.gate.is_open",
        "return True",
        (_GATE,),
    ),
    Mutant(
        "eq. 2: tokens left",
        "requests weigh by the same number of tokens",
        _DEMAND,
        "tokens[:, None] * sensitivity",
        "sensitivity",
        (_PLAN,),
    ),
    Mutant(
        "eq. 2: progress",
        "what a request has done weighs as if it were still to do",
        _FORESIGHT,
        "        at_hand.setdefault(sequence.request_id, progress)\n",
        "        at_hand.setdefault(sequence.request_id, RequestProgress())\n",
        (_PLAN,),
    ),
    Mutant(
        "eq. 2: answer length",
        "the task's answer length is not looked at",
        _PLANNER,
        "expected = min(self._profile.output_tokens(task, UNKNOWN_OUTPUT_TOKENS), max_tokens)",
        "expected = min(UNKNOWN_OUTPUT_TOKENS, max_tokens)",
        (_PLAN,),
    ),
    Mutant(
        "eq. 2: sensitivity",
        "the rates of a layer do not depend on which tasks are sensitive there",
        _DEMAND,
        "tokens[:, None] * sensitivity",
        "tokens[:, None] * np.ones_like(sensitivity)",
        (_PLAN,),
    ),
    Mutant(
        "eq. 2: shares",
        "every expert is expected to be wished for alike",
        _DEMAND,
        "np.stack([request.shares for request in requests]))",
        "np.stack([np.full_like(request.shares, 1 / request.shares.shape[1]) for request in requests]))",
        (_PLAN,),
    ),
    Mutant(
        "sensitivity: profile",
        "the planner does not know what tasks are sensitive to",
        _PLANNER,
        "sensitivity = self._profile.sensitivity(task)",
        "sensitivity = np.ones(self._profile.num_layers)",
        (_PLAN,),
    ),
    Mutant(
        "sensitivity: plan",
        "the policy is not told how sensitive the requests at hand are",
        _PLANNER,
        "return ExpectedWishes(rates, joined, continuing, mean_sensitivity(demands, tokens))",
        "return ExpectedWishes(rates, joined, continuing, np.ones(len(rates), np.float32))",
        (_PLAN,),
    ),
    Mutant(
        "joined",
        "the policy is not told what new requests are expected to wish for",
        _PLANNER,
        "        if is_new.any():\n",
        "        if False:\n",
        (_PLAN,),
    ),
    Mutant(
        "urgent",
        "requests of other tasks wait for the next plan that is due",
        _FORESIGHT,
        "if idle or self._planning.due or self._planner.is_urgent(at_hand):",
        "if idle or self._planning.due:",
        (f"{_WIRING}::test_requests_of_other_tasks_are_planned_for_at_once",),
    ),
)
