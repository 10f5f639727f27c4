"""Attention of blocks of queries to blocks of keys: one tile of the scores at a time, and the gradient of one.

Which device a block comes from is ring.py's business.
Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867. Its backward pass from the logarithm of the sum:
Dao et al. 2022, arXiv 2205.14135, appendix B.

Legend: B batch, K key/value heads, G query heads to one of those, D head size, T tokens of a device's part of the
sequence, t queries and s keys of a tile. Statistics and sums are float32.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.models.attention import MASKED

SCORES = 32 << 20  # bytes of one tile's float32 scores, about: they bound the memory, and make matmuls large
MIN_BLOCK = 128
LATEST = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Grid:
    """How a device's part of the sequence, one or two chunks, is cut into blocks; no block spans two chunks.

    Where blocks do not divide a chunk, its last one reaches back into the one before: those tokens are stale in it.
    """

    chunks: int
    chunk: int  # tokens
    block: int  # tokens

    @classmethod
    def of(cls, time: int, chunks: int, rows: int) -> "Grid":
        """time: T. rows: B * K * G, which with SCORES decide how large a block may be."""
        largest = max(MIN_BLOCK, 1 << int(math.log2(SCORES / (4 * rows)) / 2))
        chunk = time // chunks
        return cls(chunks, chunk, math.ceil(chunk / math.ceil(chunk / largest)))

    @property
    def blocks(self) -> int:
        """Of one chunk."""
        return math.ceil(self.chunk / self.block)

    def cut(self, tree: Any, index: jax.Array) -> Any:
        """One block of arrays whose dimension 3 is T."""
        start, _ = self._start(index)
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, self.block, 3), tree)

    def put(self, tree: Any, parts: Any, index: jax.Array) -> Any:
        """The arrays with one block replaced."""
        start, _ = self._start(index)
        write = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda x, part: write(x, part, start, 3), tree, parts)

    def tokens(self, tokens: "Tokens", index: jax.Array, stale: int) -> "Tokens":
        """One block of tokens. stale: a position that hides a token which an earlier block has dealt with."""
        start, fresh = self._start(index)
        positions, segments = (
            jax.lax.dynamic_slice_in_dim(x, start, self.block, axis)
            for x, axis in ((tokens.positions, 0), (tokens.segments, 1))
        )
        if self.chunk % self.block:
            positions = jnp.where(start + jnp.arange(self.block) < fresh, stale, positions)
        return Tokens(positions, segments)

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

    def _start(self, index):
        """First token of a block, and its first one that no earlier block holds."""
        chunk = index // self.blocks * self.chunk
        fresh = chunk + index % self.blocks * self.block
        return jnp.minimum(fresh, chunk + self.chunk - self.block), fresh


class Tokens(NamedTuple):
    """What the mask asks of tokens."""

    positions: jax.Array  # int32 [T], in the whole sequence
    segments: jax.Array  # int32 [B, T]


def visible(queries: Tokens, keys: Tokens, window: jax.Array | None) -> jax.Array:
    """The mask [B, t, s]: True where a query sees a key."""
    distance = queries.positions[:, None] - keys.positions[None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    return mask[None] & (queries.segments[:, :, None] == keys.segments[:, None, :])


def may_see(queries: Tokens, keys: Tokens, window: jax.Array | None) -> jax.Array:
    """False where a glance at the tile's borders tells that no query sees a key, by segment or window."""
    (q_low, q_high), (k_low, k_high) = ((x.segments.min(1), x.segments.max(1)) for x in (queries, keys))
    some = jnp.any((q_low <= k_high) & (k_low <= q_high))
    return some if window is None else some & (queries.positions[0] - keys.positions[-1] < window)


class Partial(NamedTuple):
    """Attention to the keys met so far."""

    out: jax.Array  # [B, K, G, T, D], not yet divided by `total`
    peak: jax.Array  # [B, K, G, T], the largest score
    total: jax.Array  # [B, K, G, T], sum of exp(score - peak)

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Partial":
        statistic = jnp.zeros(shape[:-1], jnp.float32)
        return cls(jnp.zeros(shape, jnp.float32), statistic + MASKED, statistic)

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """The output, and the logarithm of the sum of exp(score); zeros where a query saw nothing."""
        total = jnp.where(self.total > 0, self.total, 1.0)
        logsum = jnp.where(self.total > 0, self.peak + jnp.log(total), 0.0)
        return self.out / total[..., None], logsum


def attend(part: Partial, q_BKGtD, k_BKsD, v_BKsD, mask_Bts) -> Partial:
    """The block of queries, with a block of keys added to what it has met."""
    scores = _scores(q_BKGtD, k_BKsD, mask_Bts)
    peak = jnp.maximum(part.peak, scores.max(-1))
    weights = jnp.exp(scores - peak[..., None])
    fade = jnp.exp(part.peak - peak)
    out = _dot("bkgts,bksd->bkgtd", weights.astype(v_BKsD.dtype), v_BKsD)
    return Partial(part.out * fade[..., None] + out, peak, part.total * fade + weights.sum(-1))


def attend_backward(q_BKGtD, k_BKsD, v_BKsD, mask_Bts, dout_BKGtD, logsum_BKGt, delta_BKGt):
    """Gradients, in float32, of the block of queries, and of the blocks of keys and values stacked on axis 0.

    dout: of the output. delta: sum over D of output times dout.
    """
    weights = jnp.exp(_scores(q_BKGtD, k_BKsD, mask_Bts) - logsum_BKGt[..., None])
    dv = _dot("bkgts,bkgtd->bksd", weights.astype(v_BKsD.dtype), dout_BKGtD)
    dweights = _dot("bkgtd,bksd->bkgts", dout_BKGtD, v_BKsD)
    dscores = weights * (dweights - delta_BKGt[..., None]) * _scale(q_BKGtD)
    dscores = dscores.astype(q_BKGtD.dtype)
    dk = _dot("bkgts,bkgtd->bksd", dscores, q_BKGtD)
    return _dot("bkgts,bksd->bkgtd", dscores, k_BKsD), jnp.stack([dk, dv])


def _scores(q_BKGtD, k_BKsD, mask_Bts) -> jax.Array:
    scores = _dot("bkgtd,bksd->bkgts", q_BKGtD, k_BKsD) * _scale(q_BKGtD)
    # -inf, less a finite peak, is a weight of exactly 0: also for a query that sees nothing of this block.
    return jnp.where(mask_Bts[:, None, None], scores, -jnp.inf)


def _scale(q: jax.Array) -> float:
    return 1.0 / math.sqrt(q.shape[-1])


def _dot(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)
