"""Mutants of audits, and of the search for a tolerance that keeps a quality target."""

from tests.mutants.mutant import Mutant

_AUDITS = "tests/audit/test_audits.py"
_TARGET = "tests/audit/test_target.py"
_AUDITOR = "emoe_jax/audit/auditor.py"
_SEARCH = "emoe_jax/audit/target.py"
_MIX = "emoe_jax/audit/mix.py"

AUDITS = (
    Mutant(
        "audit: all experts",
        "an audited text is computed with what happens to be resident",
        _AUDITOR,
        'routing="exact", compared_with',
        'routing="resident", compared_with',
        (f"{_AUDITS}::test_an_audit_finds_what_two_uncached_forwards_differ_by",),
    ),
    Mutant(
        "audit: sample",
        "of a long answer only the first tokens are audited",
        "emoe_jax/requests/served.py",
        "        return drawn if drawn < MOST_KEPT else None\n",
        "        return None if drawn >= 0 else drawn\n",
        (f"{_AUDITS}::test_long_answers_are_audited_on_a_sample_of_their_tokens",),
    ),
    Mutant(
        "audit: pages",
        "the pages of an audit are not given back",
        _AUDITOR,
        "        self._pool.free(text.pages)\n",
        "",
        (f"{_AUDITS}::test_audits_between_the_steps_of_others_change_nothing_for_them",),
    ),
    Mutant(
        "audit: nothing lost",
        "an answer that gave nothing up is computed again",
        _AUDITOR,
        "        return not self.answer.substituted and not self.answer.num_cached\n",
        "        return self.answer.num_cached < 0\n",
        (f"{_AUDITS}::test_an_answer_that_lost_nothing_is_not_computed_again",),
    ),
    Mutant(
        "audit: turns",
        "an answer that gave nothing up goes before those that wait, so that only lossy ones are ever given up",
        _AUDITOR,
        "        tokens = sequence.tokens(0, int(served.positions[-1]) + 1)\n",
        "        if not sequence.substituted:\n"
        "            self._book(sequence, 0.0, 1.0)\n"
        "            return\n"
        "        tokens = sequence.tokens(0, int(served.positions[-1]) + 1)\n",
        (f"{_AUDITS}::test_answers_that_lost_nothing_are_given_up_like_others",),
    ),
    Mutant(
        "audit: interval",
        "the interval of an estimate has equal arms, though few answers lose much and most little",
        "emoe_jax/audit/findings.py",
        "(loss / factor, min(most, loss * factor))",
        "(loss * (1 - math.log(factor)), min(most, loss * (1 + math.log(factor))))",
        (f"{_TARGET}::test_intervals_hold_the_truth_about_as_often_as_they_say",),
    ),
    Mutant(
        "audit: unseen",
        "losses that no audit met are not allowed for",
        "emoe_jax/audit/findings.py",
        "max(high, more[2])",
        "high",
        (f"{_TARGET}::test_losses_that_no_audit_met_are_allowed_for",),
    ),
    Mutant(
        "target: down",
        "a tolerance stays though audits say that it loses too much",
        _SEARCH,
        "            return -min(max(1, down), LONGEST_FALL, self._rung)\n",
        "            return 0 * down\n",
        (f"{_TARGET}::test_it_comes_down_when_traffic_changes",),
    ),
    Mutant(
        "target: up",
        "a tolerance is never raised",
        _SEARCH,
        "        return max(0, min(int(math.log(room, GROWTH)), above - 1 - self._rung)) if room >= 1 else 0\n",
        "        return min(0, above) if room >= 1 else 0\n",
        (f"{_TARGET}::test_it_finds_the_largest_tolerance_that_keeps_the_target",),
    ),
    Mutant(
        "target: memory",
        "a tolerance that lost too much is tried again at once",
        _SEARCH,
        "            self._lossy[self._rung] = self._requests\n",
        "            pass\n",
        (f"{_TARGET}::test_a_tolerance_that_lost_too_much_is_left_alone_for_a_while",),
    ),
    Mutant(
        "target: kinds",
        "every audit counts for every answer, whatever experts they wish for",
        _MIX,
        "    alike = (seen >= ALIKE) & (seen >= seen.max(axis=-1, keepdims=True) - NEAR)\n",
        "    alike = (seen >= 0) & (seen >= seen.max(axis=-1, keepdims=True) - 2)\n",
        (f"{_TARGET}::test_it_comes_down_without_an_audit_when_a_known_kind_that_loses_more_grows",),
    ),
    Mutant(
        "target: drift",
        "what answers give up may grow unseen",
        _MIX,
        "rates @ (tokens * own)",
        "rates @ (tokens * 0.02)",
        (f"{_TARGET}::test_it_comes_down_without_an_audit_when_answers_give_up_more",),
    ),
    Mutant(
        "target: unknown",
        "answers of a kind that no audit knows are taken for known ones",
        _SEARCH,
        "or self._mix.unknown > UNKNOWN:\n            return False\n",
        "or self._mix.unknown > 1:\n            return False\n",
        (f"{_TARGET}::test_answers_of_a_kind_that_no_audit_knows_are_audited",),
    ),
)
