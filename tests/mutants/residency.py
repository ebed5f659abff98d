"""Mutants of what is resident: refresh, learned dynamics, sensitivity, slots per layer, link, host tier."""

from tests.mutants.mutant import Mutant

_WIRING = "tests/engine/test_wiring.py"
_REFRESH = f"{_WIRING}::test_residents_follow_the_wishes_of_an_answer"
_DYNAMICS = "tests/residency/test_periodic.py::test_the_engine_follows_learned_dynamics_of_every_request_at_hand"
_LINK = f"{_WIRING}::test_background_loads_keep_below_the_links_bandwidth"
_MODELLED = f"{_WIRING}::test_loads_go_over_the_modelled_link"
_AHEAD = "tests/engine/test_looking_ahead.py::test_the_next_layers_experts_are_asked_for_before_it_is_reached"
_HOST = f"{_WIRING}::test_experts_are_read_from_files_once_where_the_host_has_room"
_LAYERS = "tests/residency/test_foresight.py::test_layers_that_spread_get_more_slots"

_KNOWLEDGE = "emoe_jax/residency/knowledge.py"
_REGISTRY = "emoe_jax/policies/registry.py"
_RESIDENCY = "emoe_jax/residency/residency.py"
_LOADING = "emoe_jax/engine/loading.py"
_POLICY = "emoe_jax/policies/policy.py"

RESIDENCY = (
    Mutant(
        "plan",
        "the policy is not told of the requests at hand",
        _RESIDENCY,
        "        self.policy.plan(expected)\n",
        "",
        ("tests/residency/test_foresight.py::test_residents_follow_the_task_at_hand",),
    ),
    Mutant(
        "refresh: policy",
        "`emoe` keeps to its plan",
        _REGISTRY,
        '"emoe": PolicyKind("prompt", _refresh, follows_requests=True)',
        '"emoe": PolicyKind("prompt", lambda *_: Fixed(), follows_requests=True)',
        (_REFRESH,),
    ),
    Mutant(
        "refresh: wishes",
        "the policy takes in nothing of what routers wish for",
        _POLICY,
        "        self._steps += 1\n",
        "",
        (_REFRESH,),
    ),
    Mutant(
        "refresh: loads",
        "between plans nothing is loaded",
        _RESIDENCY,
        "            self._follow_policy(min(SWAPS_PER_LAYER, max(1, tokens)))\n",
        "",
        (_REFRESH,),
    ),
    Mutant(
        "known.dynamics",
        "the policy has not what was learned of how wishes go on",
        _REGISTRY,
        "Refresh(known.dynamics or Dynamics.untrained(num_layers, num_experts))",
        "Refresh(Dynamics.untrained(num_layers, num_experts))",
        (f"{_DYNAMICS}[1]",),
    ),
    Mutant(
        "dynamics: engine",
        "what was learned of how wishes go on is read and left aside",
        _KNOWLEDGE,
        "return PolicyWeights(self.dynamics, self.transitions, matrices)",
        "return PolicyWeights(None, self.transitions, matrices)",
        (f"{_DYNAMICS}[1]",),
    ),
    Mutant(
        "dynamics: other experts",
        "a forecast goes by each expert's own wishes alone",
        "emoe_jax/policies/refresh.py",
        "linear = own + mixed[..., :size].reshape(shape)",
        "linear = own",
        (f"{_DYNAMICS}[1]",),
    ),
    Mutant(
        "dynamics: network",
        "the forecast within an answer is the linear one",
        "emoe_jax/policies/refresh.py",
        "        if dynamics.network is None:\n",
        "        if True:\n",
        ("tests/policies/test_rules.py::test_the_network_says_of_equal_requests_what_it_says_of_one_and_counts_less",),
    ),
    Mutant(
        "sensitivity: exchanges",
        "layers in which no expert matters load experts",
        _POLICY,
        "        is_due &= self.sensitivity > 0\n",
        "",
        ("tests/residency/test_foresight.py::test_a_task_that_needs_no_expert_in_particular_loads_none",),
    ),
    Mutant(
        "sensitivity: gains",
        "an exchange counts the same in every layer",
        _POLICY,
        "gain[row, nth] * self.sensitivity[layers[row, 0]]",
        "gain[row, nth]",
        ("tests/policies/test_sensitivity.py::test_gains_count_by_the_sensitivity_of_their_layer",),
    ),
    Mutant(
        "slots per layer",
        "every layer gets the same number of slots",
        _LOADING,
        "plan = functools.partial(plan, spread=functools.partial(known.split, config=config))",
        "plan = functools.partial(plan)",
        (_LAYERS,),
    ),
    Mutant(
        "slots per layer: profile",
        "slots are not split by what the task profile says",
        _KNOWLEDGE,
        "return tuple(split_slots(sum(capacities), np.stack(routed), config.top_k)) if routed else capacities",
        "return capacities",
        (_LAYERS,),
    ),
    Mutant(
        "link bandwidth: engine",
        "loads are not held back by --link-bandwidth",
        _LOADING,
        "        link_bandwidth=parse_bandwidth(options.link_bandwidth),\n",
        "",
        (_LINK,),
    ),
    Mutant(
        "link bandwidth: loader",
        "the loader does not know the bandwidth",
        _RESIDENCY,
        "            bandwidth=link_bandwidth,\n",
        "",
        (_LINK,),
    ),
    Mutant(
        "modelled link: engine",
        "loads take no more time under --link-gbps",
        _LOADING,
        "        modelled_link=None if options.link_gbps is None else ModelledLink(1e9 * options.link_gbps),\n",
        "",
        (_MODELLED,),
    ),
    Mutant(
        "modelled link: loader",
        "loads do not go over the modelled link",
        "emoe_jax/experts/loader.py",
        "        if self._link is None:\n",
        "        if True:\n",
        (_MODELLED, "tests/experts/test_link.py::test_every_load_takes_its_time"),
    ),
    Mutant(
        "look ahead: guess",
        "no step asks for the experts of the layer to come",
        "emoe_jax/device/layered.py",
        "                ahead.expect(m + 1, np.asarray(guess))\n",
        "",
        (_AHEAD,),
    ),
    Mutant(
        "look ahead: router",
        "a layer's own choices stand for those of the next one",
        "emoe_jax/device/layered.py",
        "                ahead.expect(m + 1, np.asarray(guess))\n",
        "                ahead.expect(m + 1, counts)\n",
        (_AHEAD,),
    ),
    Mutant(
        "look ahead: policy",
        "`pre-gated` is `lru`",
        _RESIDENCY,
        "LoadsAhead(self._loader, self.table) if POLICIES[policy].looks_ahead else None",
        "None",
        (_AHEAD,),
    ),
    Mutant(
        "link bandwidth: queue",
        "a load does not keep the link busy",
        "emoe_jax/experts/tickets.py",
        "max(now, self._link_free_at) + self._seconds_per_round",
        "max(now, self._link_free_at)",
        (_LINK,),
    ),
    Mutant(
        "host tier: engine",
        "experts off the device stay in files",
        _LOADING,
        "        host_bytes=memory.host_bytes,\n",
        "",
        (_HOST,),
    ),
    Mutant(
        "host tier: store",
        "the store keeps nothing that it has read",
        "emoe_jax/experts/store.py",
        "                        self._count(evictions=self._tier.keep(key, read.record))\n",
        "                        pass\n",
        (_HOST,),
    ),
    Mutant(
        "host tier: start",
        "nothing is read into host memory before a load asks for it",
        _RESIDENCY,
        "        self._store.start_filling(zip(layers.tolist(), experts.tolist(), strict=True))\n",
        "",
        ("tests/residency/test_residency.py::test_absent_experts_come_to_host_memory_the_best_first",),
    ),
    Mutant(
        "host tier: evictions",
        "the store is not told of what is on the device",
        "emoe_jax/experts/loader.py",
        "        finally:\n            self._store.use_residents(self._table.resident_mask)\n",
        "        finally:\n            pass\n",
        ("tests/experts/test_filling.py::test_loads_after_the_start_come_from_host_memory",),
    ),
    Mutant(
        "pieces: table",
        "an expert stays in the table while its slot is written in part",
        "emoe_jax/experts/writes.py",
        "else self._table.reserve(ticket.layer, slot)",
        "else None",
        ("tests/experts/test_pieces.py::test_a_slot_written_in_part_holds_no_expert",),
    ),
    Mutant(
        "compile first",
        "steps are compiled when slab and KV cache have filled the device",
        _LOADING,
        "    if compiles_first(platform):\n",
        "    if False:\n",
        ("tests/engine/test_loading_order.py::test_steps_are_compiled_before_memory_is_taken",),
    ),
    Mutant(
        "settle",
        "a prompt that finds the engine idle does not wait for its experts",
        "emoe_jax/engine/loop.py",
        "            self._foresight.settle(plan, self._load_wait)\n",
        "            pass\n",
        (f"{_WIRING}::test_an_idle_engine_waits_for_the_experts_of_a_prompt",),
    ),
)
