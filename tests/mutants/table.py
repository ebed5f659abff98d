"""All mutants. A mechanism that is wired in at several places has one for each."""

from tests.mutants.admission import ADMISSION
from tests.mutants.audits import AUDITS
from tests.mutants.contracts import CONTRACTS
from tests.mutants.formats import FORMATS
from tests.mutants.invocations import INVOCATIONS
from tests.mutants.kernels import KERNELS
from tests.mutants.latent import LATENT
from tests.mutants.planning import PLANNING
from tests.mutants.prediction import PREDICTION
from tests.mutants.residency import RESIDENCY
from tests.mutants.steps import STEPS

MUTANTS = (
    *PREDICTION,
    *INVOCATIONS,
    *RESIDENCY,
    *CONTRACTS,
    *AUDITS,
    *ADMISSION,
    *FORMATS,
    *LATENT,
    *KERNELS,
    *PLANNING,
    *STEPS,
)
