"""Mutants of the routing contracts: tolerance, budget, sacred choices, forwards that are repeated, waves."""

from tests.mutants.mutant import Mutant

_CONTRACTS = "tests/engine/test_contracts.py"
_EXACT = f"{_CONTRACTS}::test_exact_gives_the_full_models_tokens[whole-6-greedy]"
_ALLOWED = "tests/models/test_routing.py::test_only_what_a_row_allows_is_replaced"

_BIAS = "tests/models/test_routing.py::test_a_bias_chooses_and_does_not_weigh"

_DISPATCHER = "emoe_jax/device/dispatcher.py"
_ROUTING = "emoe_jax/models/routing.py"
_STEP = "emoe_jax/device/step.py"

CONTRACTS = (
    Mutant(
        "contract: repeat",
        "a whole forward stands though it missed experts that it needed",
        _DISPATCHER,
        " if missing.any() else None\n",
        " if False else None\n",
        (_EXACT,),
    ),
    Mutant(
        "trace: ranks",
        "experts that rank behind the chosen ones count as wishes where a trace is to hold them",
        _DISPATCHER,
        "report.ranked[..., : config.top_k]",
        "report.ranked",
        ("tests/traces/test_recorded_engine.py::test_a_trace_holds_as_many_ranks_as_the_engine_was_loaded_with",),
    ),
    Mutant(
        "contract: where it goes on",
        "a whole forward that missed experts in several layers goes on from the last of them",
        _DISPATCHER,
        "        return int(np.flatnonzero(missing.any(axis=1))[0])",
        "        return int(np.flatnonzero(missing.any(axis=1))[-1])",
        (_EXACT,),
    ),
    Mutant(
        "contract: first stands",
        "the next step begins before a doubtful one stands",
        "emoe_jax/engine/loop.py",
        "            self._wait_for(dispatched)\n        return",
        "            pass\n        return",
        (f"{_CONTRACTS}::test_where_forwards_are_repeated_often_a_step_stands_before_the_next_one_begins",),
    ),
    Mutant(
        "contract: stops kept",
        "a whole forward is computed again from its first layer on",
        _STEP,
        "    return shape.tiles == 0\n",
        "    return False\n",
        (f"{_CONTRACTS}::test_a_forward_that_missed_goes_on_where_it_did",),
    ),
    Mutant(
        "loads: no call to stage",
        "records that are on a CPU device already are sent to it",
        "emoe_jax/experts/slab.py",
        "return staged if len(staged) == len(records) else",
        "return",
        ("tests/experts/test_expert_slab.py::test_a_record_of_a_cpu_s_host_memory_is_staged_without_a_call",),
    ),
    Mutant(
        "loads: at hand",
        "experts that host memory has go through the queue",
        "emoe_jax/experts/loader.py",
        "            record = None if self._queue.has(layer, expert) else self._store.at_hand(layer, expert)\n",
        "            record = None\n",
        ("tests/experts/test_load_now.py::test_what_host_memory_has_needs_no_queue",),
    ),
    Mutant(
        "loads: calls filled up",
        "small records are written in more calls than one",
        "emoe_jax/experts/slab.py",
        "                size *= 2\n",
        "                pass\n",
        ("tests/experts/test_expert_slab.py::test_small_records_fill_a_call_up",),
    ),
    Mutant(
        "contract: what follows",
        "a step that was begun before the one it builds on stood is not computed again",
        _DISPATCHER,
        "                self._runner.compute(later)\n",
        "                del later\n",
        (_EXACT,),
    ),
    Mutant(
        "contract: tokens kept",
        "a plan writes its tokens where the plan before the last one has its own",
        "emoe_jax/device/shapes.py",
        "PLANS_KEPT = 3\n",
        "PLANS_KEPT = 2\n",
        (_EXACT,),
    ),
    Mutant(
        "contract: tolerance",
        "every absent wish may be replaced",
        _ROUTING,
        "(shares < allowances.tolerance[:, None]) & ",
        "",
        (_ALLOWED,),
    ),
    Mutant(
        "contract: sacred",
        "first choices may be replaced",
        _ROUTING,
        " & (rank >= allowances.sacred[:, None])",
        "",
        (_ALLOWED,),
    ),
    Mutant(
        "contract: budget",
        "what a token gives up is not held against its budget",
        _ROUTING,
        "    return candidates & (spent <= allowances.budget[:, None])\n",
        "    return candidates\n",
        (_ALLOWED,),
    ),
    Mutant(
        "router: choice bias",
        "experts rank by their scores without the bias",
        _ROUTING,
        "scores + choice_bias.astype(jnp.float32)[None, :]",
        "scores",
        (_BIAS,),
    ),
    Mutant(
        "router: groups",
        "experts rank alike whatever their group is",
        _ROUTING,
        ", ranks, ranks - spread - 1)",
        ", ranks, ranks)",
        (_BIAS,),
    ),
    Mutant(
        "contract: budget of all layers",
        "each layer has the whole budget of a token",
        _STEP,
        "            allowances = allowances._replace(budget=at.budget)\n",
        "",
        (f"{_CONTRACTS}::test_a_token_never_gives_up_more_than_its_budget[whole]",),
    ),
    Mutant(
        "waves: order of eviction",
        "a wave takes the slots of experts that the next one uses",
        "emoe_jax/residency/waves.py",
        "        room = max(1, capacity - int(resident.sum()))\n",
        "        room = capacity\n",
        ("tests/residency/test_waves.py::test_every_used_expert_is_in_one_wave_and_is_loaded_once",),
    ),
)
