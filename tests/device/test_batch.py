"""The shapes that batches are padded to."""

from hypothesis import given
from hypothesis import strategies as st

from emoe_jax.device.batch import batches_of
from emoe_jax.device.block_tables import SentTables
from emoe_jax.device.shapes import LARGE_TILE, TILE, Buckets
from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.pages import pages_for
from emoe_jax.scheduling.plan import PrefillChunk, StepPlan

PLATFORMS = st.sampled_from(["cpu", "cuda"])


@given(st.integers(1, 64), st.integers(2, 2048), PLATFORMS, st.data())
def test_less_than_half_of_a_shape_is_padding(
    max_num_seqs: int, prefill_chunk: int, platform: str, data: st.DataObject
):
    """Of the decoding rows without prompts, and of the tiles with one, but for the last tile."""
    buckets = Buckets.of(max_num_seqs, prefill_chunk, 4096, platform)
    sequences = data.draw(st.integers(1, max_num_seqs))
    decode = buckets.fit(sequences)
    assert sequences <= decode.sequences < 2 * sequences
    assert decode.rows == decode.sequences
    length = data.draw(st.integers(2, prefill_chunk))
    mixed = buckets.fit(sequences, [length])
    assert mixed.decodes == mixed.sequences == max_num_seqs
    assert length <= mixed.tiles * mixed.tile < 2 * length + LARGE_TILE
    if length <= LARGE_TILE or platform != "cpu":
        assert mixed.tiles * mixed.tile < max(2 * length, TILE + 1) + TILE
    assert {decode, mixed} <= set(buckets.shapes)  # those that are compiled beforehand


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=12),
    st.lists(st.integers(1, 60), max_size=12),
    st.sampled_from([8, 100, 512]),
    PLATFORMS,
    st.booleans(),
)
def test_every_token_of_a_plan_has_one_row(
    contexts: list[int], prompts: list[int], budget: int, platform: str, alone: bool
):
    """At its position, in a tile or at the place of its own sequence, with that sequence's block table."""
    decoding, reading, page = [], [], 1
    for index, length in enumerate([*contexts, *(min(length, budget) for length in prompts)]):
        sequence = Sequence(str(index), list(range(1000 * index, 1000 * index + length)))
        sequence.pages = list(range(page, page + pages_for(length)))
        page += len(sequence.pages)
        (decoding if index < len(contexts) else reading).append(sequence)
    for sequence in decoding:
        sequence.num_computed = sequence.num_known - 1
    plan = StepPlan(tuple(decoding), tuple(PrefillChunk(each, 0, len(each.prompt_token_ids), True) for each in reading))
    buckets = Buckets.of(24, budget, 512, platform)
    seen: list[tuple[int, int]] = []
    for batch in batches_of(plan, buckets, SentTables(buckets.pages), alone=alone):
        shape, inputs = batch.shape, batch.inputs
        assert shape in buckets.shapes
        assert sum(inputs.lengths) == sum(piece.length for piece in batch.pieces)
        for group in range(shape.groups):
            tile = group - shape.decodes
            first, size = (group, 1) if tile < 0 else (shape.decodes + tile * shape.tile, shape.tile)
            place = group if tile < 0 else inputs.tile_places[tile]
            assert inputs.lengths[group] <= size
            for offset in range(inputs.lengths[group]):
                sequence, position = batch.pieces[place].sequence, int(inputs.starts[group]) + offset
                assert inputs.tokens[first + offset] == sequence.prompt_token_ids[position]
                assert inputs.block_tables[place][position // 16] == sequence.pages[position // 16]
                seen.append((int(sequence.request_id), position))
        for place, piece in enumerate(batch.pieces):
            assert (
                inputs.tokens[inputs.last_rows[place]]
                == piece.sequence.prompt_token_ids[piece.start + piece.length - 1]
            )
    wanted = [(int(each.request_id), each.num_computed) for each in decoding]
    wanted += [(int(each.request_id), position) for each in reading for position in range(len(each.prompt_token_ids))]
    assert sorted(seen) == sorted(wanted)
