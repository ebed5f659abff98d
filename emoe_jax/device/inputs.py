"""What a step is told, in one buffer: tokens, positions and block tables of a flat batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from emoe_jax.attention import KVView, LayerKV, Places, attend, write
from emoe_jax.attention.uncached import attend_causally
from emoe_jax.config import ModelConfig
from emoe_jax.device.packing import Packing
from emoe_jax.device.shapes import Shape
from emoe_jax.models.decoder import AttendFunction
from emoe_jax.models.routing import Allowances


class StepInputs(NamedTuple):
    """A padded batch, on the host or on the device. A group is a decoding row or a tile (`Shape`).

    A token of `-1 - p` is the one at place `p` of the `last_tokens` that earlier steps sampled.
    """

    tokens: Int32[Any, " R"]
    starts: Int32[Any, " row_groups"]
    """The position of each group's first row."""
    lengths: Int32[Any, " row_groups"]
    """How many rows of each group are no padding."""
    tile_places: Int32[Any, " tiles"]
    """The place of each tile's sequence."""
    last_rows: Int32[Any, " B"]
    """By place: the row of the sequence's newest token."""
    token_places: Int32[Any, " B"]
    """By place: where in `last_tokens` the sampled token is kept; past their end for a token that is not."""
    tolerances: Float32[Any, " B"]
    """By place: the parts of the sequence's `Allowance`."""
    budgets: Float32[Any, " B"]
    sacred: Int32[Any, " B"]
    block_tables: Int32[Any, "B pages_per_sequence"]
    """Last, so that a buffer may be cut before them."""

    @staticmethod
    @functools.cache
    def packing(shape: Shape) -> Packing:
        """How the arrays of a shape lie in one buffer."""
        groups, places = ((shape.groups,), np.int32), ((shape.sequences,), np.int32)
        shares = (shape.sequences,), np.float32
        return Packing(
            tokens=((shape.rows,), np.int32),
            starts=groups,
            lengths=groups,
            tile_places=((shape.tiles,), np.int32),
            last_rows=places,
            token_places=places,
            tolerances=shares,
            budgets=shares,
            sacred=places,
            block_tables=((shape.sequences, shape.pages), np.int32),
        )


class FlatBatch(NamedTuple):
    """A batch on the device, as the functions of a step read it while they are traced."""

    inputs: StepInputs
    shape: Shape

    @classmethod
    def unpack(cls, buffer: Int32[Array | np.ndarray, " words"], shape: Shape) -> FlatBatch:
        """The batch that `StepInputs.packing` laid out."""
        return cls(StepInputs(**StepInputs.packing(shape).unpack(jnp.asarray(buffer))), shape)

    def tokens(self, last_tokens: Int[Array, " places"]) -> Int[Array, "1 R"]:
        """All tokens, those that the host does not know taken from `last_tokens`."""
        tokens = jnp.asarray(self.inputs.tokens)
        return jnp.where(tokens < 0, last_tokens.at[-1 - tokens].get(mode="clip"), tokens)[None]

    @property
    def positions(self) -> Int[Array, " R"]:
        """By row."""
        return self._by_row(lambda view: view.positions)

    @property
    def valid(self) -> Bool[Array, " R"]:
        """Which rows are no padding."""
        return self._by_row(lambda view: view.valid)

    @property
    def places(self) -> Int[Array, " R"]:
        """The place of each row's sequence."""
        decoding = jnp.arange(self.shape.decodes, dtype=jnp.int32)
        return jnp.concatenate([decoding, jnp.repeat(jnp.asarray(self.inputs.tile_places), self.shape.tile)])

    def allowances(self) -> Allowances:
        """What of each row's wishes other experts may stand in for."""
        inputs, places = self.inputs, self.places
        return Allowances(*(jnp.asarray(of)[places] for of in (inputs.tolerances, inputs.budgets, inputs.sacred)))

    def of_sequences(self) -> Bool[Array, "B R"]:
        """Which rows belong to the sequence of each place."""
        everyone = jnp.arange(self.shape.sequences, dtype=jnp.int32)
        return (self.places[None, :] == everyone[:, None]) & self.valid[None, :]

    def views(self) -> list[KVView]:
        """What the decoding rows and the tiles attend to, where the shape has any."""
        inputs, shape = self.inputs, self.shape
        starts, lengths, tables = (jnp.asarray(x) for x in (inputs.starts, inputs.lengths, inputs.block_tables))
        split = shape.decodes
        views = []
        if split:
            views.append(KVView.of(starts[:split], lengths[:split], tables, 1))
        if shape.tiles:
            of_tiles = tables[jnp.asarray(inputs.tile_places)]
            views.append(KVView.of(starts[split:], lengths[split:], of_tiles, shape.tile))
        return views

    def attend_function(self, config: ModelConfig, window: int | None, cache: LayerKV | None) -> AttendFunction:
        """Rows attend to the pages of their sequences, new rows included; without a cache a single sequence to itself.

        All new keys and values are written before any row attends.
        """
        if cache is None:
            positions, scale = self.positions[None], config.attention_scale
            return lambda q, k, v, sinks: (attend_causally(q, k, v, positions, window, scale, sinks), None)
        views, places = self.views(), self.new_places()

        def attend_fn(
            q: Float[Array, "1 R N H"],
            k: Float[Array, "1 R K H"],
            v: Float[Array, "1 R K Hv"],
            sinks: Float[Array, " N"] | None,
        ) -> tuple[Float[Array, "1 R N Hv"], LayerKV]:
            pages = write(cache, k[0], v[0], places)
            return attend_in_groups(q, pages, views, config, window, sinks), pages

        return attend_fn

    def new_places(self) -> Places:
        """Where the keys and values of the rows go."""
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *(view.places() for view in self.views()))

    def last_hidden(self, x: Float[Array, "1 R D"]) -> Float[Array, "B D"]:
        """Of each sequence's newest token."""
        return x[0][jnp.asarray(self.inputs.last_rows)]

    def _by_row(self, field: Callable[[KVView], Array]) -> Array:
        return jnp.concatenate([field(view).reshape(-1) for view in self.views()])


def attend_in_groups(
    q: Float[Array, "1 R N H"],
    pages: LayerKV,
    views: Sequence[KVView],
    config: ModelConfig,
    window: int | None,
    sinks: Float[Array, " N"] | None,
) -> Float[Array, "1 R N Hv"]:
    """The rows of a batch attend to pages that hold their keys and values: decoding rows and tiles, each by a view."""
    parts, first = [], 0
    for view in views:
        groups, rows = view.positions.shape
        part = q[0, first : first + groups * rows].reshape(groups, rows, *q.shape[2:])
        out = attend(part, pages, view, window=window, scale=config.attention_scale, sinks=sinks)
        parts.append(out.reshape(groups * rows, *out.shape[2:]))
        first += groups * rows
    return jnp.concatenate(parts)[None]
