"""Pages of keys and values: what they are, where new rows go, and what rows may see of them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.scheduling.pages import PAGE_SIZE, TRASH_PAGE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKV:
    """Keys (rotated) and values of one layer. Page 0 is the trash page: padded rows write there.

    Pages are the first axis. The order of the other axes is known to this package only: what a kv head has in a page is
    one matrix. Where `v` is None, the first `shared_value_dim` numbers of a key are its value (latent attention).
    """

    k: Float[Array, "pages K page H"]
    v: Float[Array, "pages K page H"] | None
    shared_value_dim: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def zeros(
        cls, num_pages: int, kv_heads: int, head_dim: int, dtype: str, shared_value_dim: int | None = None
    ) -> "LayerKV":
        """So many pages of zeros, the trash page included."""
        shape = (num_pages, kv_heads, PAGE_SIZE, head_dim)
        values = jnp.zeros(shape, dtype) if shared_value_dim is None else None
        return cls(jnp.zeros(shape, dtype), values, shared_value_dim)

    @property
    def kv_heads(self) -> int:
        """`K`."""
        return self.k.shape[1]

    @property
    def value_dim(self) -> int:
        """`Hv`."""
        return self.shared_value_dim or self.k.shape[3]

    def rows(self, named: Int[Array, "B pages_per_sequence"]) -> tuple[Float[Array, "n I"], ...]:
        """Copies of these pages, first the keys and then the values, unless they are a part of the keys.

        One row per sequence, kv head and page, in this order: XLA copies long rows several times as fast as blocks with
        more axes.
        """
        heads = jnp.arange(self.kv_heads, dtype=jnp.int32)
        rows = (named[:, None, :] * self.kv_heads + heads[None, :, None]).reshape(-1)
        size = PAGE_SIZE * self.k.shape[3]
        kept = (self.k,) if self.v is None else (self.k, self.v)
        return tuple(x.reshape(-1, size).at[rows].get(mode="promise_in_bounds") for x in kept)

    def split(
        self, rows: tuple[Float[Array, "n I"], ...], sequences: int
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S Hv"]]:
        """What `rows` copied for so many sequences as keys and values."""
        shaped = [x.reshape(sequences, self.kv_heads, -1, self.k.shape[3]) for x in rows]
        return shaped[0], shaped[-1][..., : self.value_dim]

    def gather(
        self, named: Int[Array, "B pages_per_sequence"]
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S Hv"]]:
        """Copies of the keys and values of these pages, one after the other."""
        return self.split(self.rows(named), len(named))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVView:
    """`T` rows of each of `B` groups: the positions of the rows, and the pages of what they may see.

    A group is one sequence, or a tile of the rows of one: several tiles then have equal block tables. A row sees the
    positions up to its own. A row that is not `valid` is padding: it sees nothing and writes to the trash page. Block
    tables are padded with page 0.
    """

    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    block_tables: Int[Array, "B pages_per_sequence"]

    @classmethod
    def of(
        cls,
        starts: Int[Array, " B"],
        lengths: Int[Array, " B"],
        block_tables: Int[Array, "B pages_per_sequence"],
        rows: int,
    ) -> "KVView":
        """Groups of `rows` rows at positions from `starts` on. The rows after the first `lengths` are padding."""
        offsets = jnp.arange(rows, dtype=jnp.int32)[None, :]
        return cls(starts[:, None] + offsets, offsets < lengths[:, None], block_tables)

    def places(self) -> "Places":
        """Where the keys and values of the rows go, with `B` and `T` as one axis."""
        pages = jnp.take_along_axis(self.block_tables, self.positions // PAGE_SIZE, axis=1)
        pages = jnp.where(self.valid, pages, TRASH_PAGE)
        return Places(pages.reshape(-1), (self.positions % PAGE_SIZE).reshape(-1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where the key and the value of each of `R` rows go: a page, and a place in it.

    Rows of padding have the trash page. Other rows have places that differ. The places of a flat step are those of its
    views one after the other: `jax.tree.map(lambda *parts: jnp.concatenate(parts), decoding.places(), tiles.places())`.
    """

    pages: Int[Array, " R"]
    offsets: Int[Array, " R"]


@jax.named_scope("kv_write")
def write(cache: LayerKV, k: Float[Array, "R K H"], v: Float[Array, "R K Hv"], places: Places) -> LayerKV:
    """The pages with the keys and values of `R` rows written to their places, in the pages' dtype.

    In place where `cache` is donated. All rows of a step are written before any row attends: rows of one chunk see each
    other through the pages. Values that are a part of the keys are there with them.
    """
    at = places.pages, slice(None), places.offsets
    keys = cache.k.at[at].set(k.astype(cache.k.dtype))
    values = None if cache.v is None else cache.v.at[at].set(v.astype(cache.v.dtype))
    return dataclasses.replace(cache, k=keys, v=values)
