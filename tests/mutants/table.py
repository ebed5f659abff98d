"""All mutants. A mechanism that is wired in at several places has one for each."""

from tests.mutants.invocations import INVOCATIONS

MUTANTS = (*INVOCATIONS,)
