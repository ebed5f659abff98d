"""How alike answers are, on cases made by hand."""

import pytest

from train.similarity import rouge_l, token_agreement


@pytest.mark.parametrize(
    ("reference", "candidate", "share"),
    [
        ([5, 6, 7], [5, 6, 7], 1),
        ([5, 6, 7], [5, 9, 7, 8], 0.5),
        ([5, 9, 7, 8], [5, 6, 7], 0.5),
        ([1, 2, 3], [9, 1, 2, 3], 0),  # one token too many at the start
        ([1, 2], [], 0),
        ([], [1], 0),
        ([], [], 1),
    ],
)
def test_token_agreement(reference: list[int], candidate: list[int], share: float) -> None:
    assert token_agreement(reference, candidate) == share


@pytest.mark.parametrize(
    ("reference", "candidate", "f1"),
    [
        ("the cat sat", "The cat sat", 1),
        ("the cat sat", "a dog", 0),
        ("a b c d", "a c", 2 * 2 / 6),
        ("a b c", "c b a", 2 * 1 / 6),
        ("a", "", 0),
        ("", "a", 0),
        ("", " ", 1),
    ],
)
def test_rouge_l(reference: str, candidate: str, f1: float) -> None:
    assert rouge_l(reference, candidate) == pytest.approx(f1)
