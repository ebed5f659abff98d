"""Mutants of what a step is told and how it is watched: block tables, edits of logits, units, the watchdog."""

from tests.mutants.mutant import Mutant

_TABLES = "tests/device/test_block_tables.py"
_EDITS = "tests/device/test_adjustments.py"
_UNITS = "tests/device/test_units.py"
_WATCHDOG = "tests/serve/test_watchdog.py"

STEPS = (
    Mutant(
        "tables: rows in use",
        "a row of the tables goes to another sequence while a plan in flight reads it",
        "emoe_jax/device/block_tables.py",
        "            row.used = self._plan\n",
        "",
        (f"{_TABLES}::test_the_device_reads_what_the_host_would_send",),
    ),
    Mutant(
        "tables: lengths",
        "a table ends with the pages of the sequence that had the row before",
        "emoe_jax/device/step.py",
        "jnp.where(is_known, tables[jnp.asarray(rows)], TRASH_PAGE)",
        "tables[jnp.asarray(rows)]",
        (f"{_TABLES}::test_the_device_does_as_the_reference",),
    ),
    Mutant(
        "tables: failures",
        "what a batch that failed took along is taken to be on the device",
        "emoe_jax/device/dispatcher.py",
        "            tables.forget()\n",
        "",
        (f"{_TABLES}::test_what_was_not_sent_is_forgotten",),
    ),
    Mutant(
        "edits: repetition",
        "repeated tokens are not held back",
        "emoe_jax/device/adjustments.py",
        "jnp.where(self.repeated, held_back, found)",
        "found",
        (f"{_EDITS}::test_logits_follow_the_definition",),
    ),
    Mutant(
        "layered: first router",
        "what stands before the first layer with experts takes part",
        "emoe_jax/device/layer_steps.py",
        "jnp.where(jnp.asarray(layer) == 0, stopped.x, first.moe_output(stopped.x, stopped.rows, total))",
        "first.moe_output(stopped.x, stopped.rows, total)",
        ("tests/engine/test_looking_ahead.py::test_tokens_are_those_of_the_fully_resident_model",),
    ),
    Mutant(
        "units: mark",
        "a whole step is optimised layer by layer",
        "emoe_jax/device/units.py",
        'set_xla_metadata(leaves[0], inlineable="false", compilation_unit=unit.__name__)',
        "leaves[0]",
        (f"{_UNITS}::test_all_layers_of_a_kind_call_one_unit",),
    ),
    Mutant(
        "units: platform",
        "calls are marked on a GPU, too",
        "emoe_jax/device/units.py",
        'if default_platform() != "cpu":',
        "if False:",
        (f"{_UNITS}::test_a_gpu_has_no_units",),
    ),
    Mutant(
        "watchdog: progress",
        "a step that brings experts in is taken to hang",
        "serve/watchdog.py",
        "signs = (began, vitals.progress)",
        "signs = (began,)",
        (f"{_WATCHDOG}::test_a_sign_of_life_starts_the_clock_anew",),
    ),
    Mutant(
        "watchdog: requests",
        "requests of a step that hangs wait with it",
        "serve/worker.py",
        "            self._fail_everything(Unavailable(hang))\n",
        "",
        (f"{_WATCHDOG}::test_requests_of_a_hanging_step_end_and_others_come_after_it",),
    ),
)
