"""All mutants. A mechanism that is wired in at several places has one for each."""

from tests.mutants.admission import ADMISSION
from tests.mutants.invocations import INVOCATIONS
from tests.mutants.prediction import PREDICTION
from tests.mutants.residency import RESIDENCY

MUTANTS = (*PREDICTION, *INVOCATIONS, *RESIDENCY, *ADMISSION)
