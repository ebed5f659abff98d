"""A tokenizer trained on a little text, shared by the tests of training."""

import pytest
from tokenizers import Tokenizer

from train.demo import tokenizer


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return tokenizer.train(seed=0, vocab_size=600, pieces=300)
