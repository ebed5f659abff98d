"""The shapes that batches are padded to."""

from hypothesis import given
from hypothesis import strategies as st

from emoe_jax.device.batch import Buckets

SMALLEST_CHUNK = 32


@given(st.integers(1, 64), st.integers(2, 2048), st.data())
def test_less_than_half_of_a_shape_is_padding(max_num_seqs: int, prefill_chunk: int, data: st.DataObject):
    buckets = Buckets.of(max_num_seqs, prefill_chunk, 4096)
    sequences = data.draw(st.integers(1, max_num_seqs))
    decode = buckets.fit(sequences, 1)
    assert sequences <= decode.sequences < 2 * sequences
    assert decode.tokens == 1
    tokens = data.draw(st.integers(2, prefill_chunk))
    chunk = buckets.fit(1, tokens)
    assert chunk.sequences == 1
    assert tokens <= chunk.tokens < max(2 * tokens, SMALLEST_CHUNK + 1)
    assert {decode, chunk} <= set(buckets.shapes)  # those that are compiled beforehand
