"""What runs on a GPU only: the compiled kernels against their references, and a step against the CPU."""

import jax
import pytest

from benchmarks.verify_gpu import kernels, steps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")]
BANDWIDTH = 1e12  # times are not judged here
DTYPES = pytest.mark.parametrize("dtype", kernels.TOLERANCE)


@DTYPES
@pytest.mark.parametrize("case", [*kernels.DRY_ATTENTION, *kernels.ATTENTION], ids=lambda case: case.name)
def test_attention_is_that_of_its_reference(case: kernels.AttentionCase, dtype: str) -> None:
    assert kernels.check_attention(case, "triton", dtype, BANDWIDTH, 1)["error"] <= kernels.TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("case", [*kernels.DRY_EXPERTS, *kernels.EXPERTS], ids=lambda case: case.name)
def test_experts_are_those_of_their_reference(case: kernels.ExpertCase, dtype: str) -> None:
    assert kernels.check_experts(case, "triton", dtype, BANDWIDTH, 1)["error"] <= kernels.TOLERANCE[dtype]


def test_a_step_has_the_logits_that_it_has_on_the_cpu() -> None:
    assert steps.check_steps("cuda")["passes"]
