"""Which blocks of queries and keys the ring goes through, and what they see of one another.

Legend: B batch, T tokens of a device's part of the sequence, N blocks of it, t queries and s keys of a tile.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.models.tile import Tokens
from jaxtune.segments import SHARED

# At most so many bytes are one tile's float32 scores; about four times as many are in use. On a CPU they fit into its
# caches (measured: 4 MiB twice as fast as 16); elsewhere they are large enough to be worth launching kernels for.
SCORES = {"cpu": 4 << 20}
SCORES_ELSEWHERE = 64 << 20
MIN_BLOCK = 128
NOWHERE = {"queries": -1, "keys": np.iinfo(np.int32).max}  # positions that see nothing, or are not seen


@dataclass(frozen=True)
class Grid:
    """How a device's part of the sequence, one or two chunks, is cut into blocks; no block spans two chunks.

    Where blocks do not divide a chunk, its last token stands behind it again; as a query it sees nothing, and as a key
    nothing sees it.
    """

    chunks: int
    chunk: int  # tokens
    block: int  # tokens

    @classmethod
    def of(cls, time: int, chunks: int, rows: int) -> "Grid":
        """time: T. rows: B * H, which with the limit on scores decide how large a block may be."""
        limit = SCORES.get(jax.default_backend(), SCORES_ELSEWHERE)
        largest = max(MIN_BLOCK, 2 ** int(math.log2(limit / (4 * rows)) / 2))
        chunk = time // chunks
        return cls(chunks, chunk, math.ceil(chunk / math.ceil(chunk / largest)))

    @property
    def blocks(self) -> int:
        """Of one chunk."""
        return math.ceil(self.chunk / self.block)

    def filled(self, x: jax.Array, dim: int) -> jax.Array:
        """An array whose dimension `dim` is T, with each chunk's last token again until its blocks are full."""
        split = x.reshape(*x.shape[:dim], self.chunks, self.chunk, *x.shape[dim + 1 :])
        more = [(0, 0)] * split.ndim
        more[dim + 1] = (0, self.blocks * self.block - self.chunk)
        return jnp.pad(split, more, mode="edge").reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])

    def emptied(self, x: jax.Array, dim: int) -> jax.Array:
        """Without what `filled` put in."""
        split = x.reshape(*x.shape[:dim], self.chunks, -1, *x.shape[dim + 1 :])
        kept = jax.lax.slice_in_dim(split, 0, self.chunk, axis=dim + 1)
        return kept.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])

    def tokens(self, positions: jax.Array, segments: jax.Array, beyond: int) -> Tokens:
        """In blocks. positions [T], segments [B, T]. beyond: the position of what stands behind a chunk."""
        places: np.ndarray = np.arange(self.chunks * self.blocks * self.block) % (self.blocks * self.block)
        positions = jnp.where(places < self.chunk, self.filled(positions, 0), beyond).reshape(-1, self.block)
        segments = self.filled(segments, 1).reshape(len(segments), -1, self.block)
        return Tokens(positions, segments.swapaxes(0, 1))

    def own_tiles(self) -> np.ndarray:
        """[tiles, 2] blocks of queries and of keys: those that causality leaves of a device's part with itself."""
        return np.argwhere(np.tril(np.ones((self.chunks * self.blocks,) * 2))).astype(np.int32)

    def guest_tiles(self) -> tuple[np.ndarray, np.ndarray]:
        """Those that it leaves with the part of an earlier device, and of a later one; as many, and whole ones.

        An earlier device's front chunk is before both chunks here and its back chunk after both; a later device's
        two chunks are both between the two here.
        """
        front, everything = self.blocks, 2 * self.blocks
        earlier = np.indices((everything, front)).reshape(2, -1).T
        later = np.indices((front, everything)).reshape(2, -1).T + np.array([front, 0])
        return earlier.astype(np.int32), later.astype(np.int32)


def may_see(queries: Tokens, keys: Tokens, window: jax.Array | None) -> jax.Array:
    """False where a glance at the borders of two blocks tells that no query sees a key, by segment or window."""
    (q_low, q_high), (k_low, k_high) = ((x.segments.min(1), x.segments.max(1)) for x in (queries, keys))
    some = jnp.any((q_low <= k_high) & (k_low <= q_high) | (k_low == SHARED))
    return some if window is None else some & (queries.positions[0] - keys.positions[-1] < window)
