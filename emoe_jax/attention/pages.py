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
    one matrix.
    """

    k: Float[Array, "pages K page H"]
    v: Float[Array, "pages K page H"]

    @classmethod
    def zeros(cls, num_pages: int, kv_heads: int, head_dim: int, dtype: str) -> "LayerKV":
        """So many pages of zeros, the trash page included."""
        shape = (num_pages, kv_heads, PAGE_SIZE, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def kv_heads(self) -> int:
        """`K`."""
        return self.k.shape[1]

    def rows(self, named: Int[Array, "B pages_per_sequence"]) -> tuple[Float[Array, "n I"], Float[Array, "n I"]]:
        """Copies of the keys and values of these pages: one row per sequence, kv head and page, in this order.

        XLA copies long rows several times as fast as blocks with more axes.
        """
        heads = jnp.arange(self.kv_heads, dtype=jnp.int32)
        rows = (named[:, None, :] * self.kv_heads + heads[None, :, None]).reshape(-1)
        size = PAGE_SIZE * self.k.shape[3]
        return (
            self.k.reshape(-1, size).at[rows].get(mode="promise_in_bounds"),
            self.v.reshape(-1, size).at[rows].get(mode="promise_in_bounds"),
        )

    def gather(
        self, named: Int[Array, "B pages_per_sequence"]
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Copies of the keys and values of these pages, one after the other."""
        shape = (len(named), self.kv_heads, named.shape[1] * PAGE_SIZE, self.k.shape[3])
        k, v = self.rows(named)
        return k.reshape(shape), v.reshape(shape)


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
def write(cache: LayerKV, k: Float[Array, "R K H"], v: Float[Array, "R K H"], places: Places) -> LayerKV:
    """The pages with the keys and values of `R` rows written to their places, in the pages' dtype.

    In place where `cache` is donated. All rows of a step are written before any row attends: rows of one chunk see each
    other through the pages.
    """
    at = places.pages, slice(None), places.offsets
    return LayerKV(cache.k.at[at].set(k.astype(cache.k.dtype)), cache.v.at[at].set(v.astype(cache.v.dtype)))
