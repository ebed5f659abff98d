"""Mutants of latent attention and of its families' routers."""

from tests.mutants.mutant import Mutant

_GOLDEN = "tests/models/test_golden.py::test_matches_transformers"

LATENT = (
    Mutant(
        "latent: temperature",
        "scores stay without the square of YaRN's temperature",
        "emoe_jax/models/hf_latent.py",
        " * rope.all_dim_factor**2",
        "",
        (f"{_GOLDEN}[deepseek_v3_groups-per_expert]",),
    ),
    Mutant(
        "latent: norm",
        "the vector of a token is kept without its norm",
        "emoe_jax/models/attention.py",
        "self.latent_norm(vector)[:, :, None, :]",
        "vector[:, :, None, :]",
        (f"{_GOLDEN}[deepseek_v2_lite-per_expert]",),
    ),
    Mutant(
        "router: two best of a group",
        "a group of experts is ranked by its best one, where it should be by the two best",
        "emoe_jax/models/routing.py",
        '2 if router.group_rank == "two_best" else 1',
        "1",
        (f"{_GOLDEN}[deepseek_v3_groups-per_expert]",),
    ),
)
