"""Causal attention of a whole sequence with itself, one tile of the scores at a time, and its gradient likewise.

Tiles that the segments, the window or causality hide are never computed, and those that they leave whole are not
masked. What one tile is, is tile.py's business, and its legend holds here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models.tile import (
    Partial,
    Tokens,
    attend,
    attend_backward,
    cut_keys,
    cut_queries,
    empty_columns,
    join_keys,
    join_queries,
    outputs_share,
    scaled,
    visible,
)
from jaxtune.segments import PADDING, SHARED

SAVED = "attended"  # the checkpoint name of what the backward pass needs beside queries, keys and values
BLOCK = 128  # tokens at most; measured: a tile's scores have to fit into a CPU's caches
ALIGN = 8
TRIPS = "trips_"  # in the name of a loop: how long it is in the mean where a row is one document, for who counts
LAST = np.iinfo(np.int32).max


def block_of(time: int) -> int:
    """How many tokens a block has."""
    return math.ceil(time / math.ceil(time / BLOCK) / ALIGN) * ALIGN


def tiled_attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    segments_BT: jax.Array,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v under the causal, segment and window mask: [B, T, H, D].

    Under jax.checkpoint with a policy that keeps the name `attended`, the backward pass does not compute the forward
    pass again.
    """
    time = segments_BT.shape[1]
    block = block_of(time)
    q, k, v, segments = (padded(x, block) for x in (q_BTHD, k_BTKD, v_BTKD, segments_BT))
    seen = None if window is None else jnp.asarray(window, jnp.int32)
    return _tiled(q, k, v, segments, seen, block)[:, :time]


def padded(x: jax.Array, multiple: int) -> jax.Array:
    """With zeros behind axis 1: tokens of segment 0, which is padding, and which nothing before them sees."""
    more = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) if more else x


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _tiled(q_BTHD, k_BTKD, v_BTKD, segments_BT, window, block):
    return _forward(q_BTHD, k_BTKD, v_BTKD, segments_BT, window, block)[0]


def _forward(q_BTHD, k_BTKD, v_BTKD, segments_BT, window, block):
    k_BNKsD, v_BNKDs = cut_keys(k_BTKD, block), cut_keys(v_BTKD, block).swapaxes(3, 4)
    mask, (batch, _, heads, _), kv_heads = Mask.of(segments_BT, window, block), q_BTHD.shape, k_BTKD.shape[2]

    def tile(queries: Queries, q_KXD, mask, j, part):
        return attend(part, q_KXD, k_BNKsD[queries.row, j], v_BNKDs[queries.row, j], mask)

    def row(_, queries):
        q_KXD = scaled(queries.cut(q_BTHD, kv_heads))
        out, logsum = queries.sweep(mask, partial(tile, queries, q_KXD), Partial.empty(q_KXD.shape)).finish()
        return None, (out.astype(v_BTKD.dtype), logsum)

    _, (out, logsum) = jax.lax.scan(row, None, mask.queries(heads // kv_heads))
    out, logsum = (checkpoint_name(x, SAVED) for x in (_whole(out, batch, block), logsum))
    return out, (q_BTHD, k_BTKD, v_BTKD, segments_BT, window, out, logsum)


def _backward(block, saved, dout_BTHD):
    q_BTHD, k_BTKD, v_BTKD, segments_BT, window, out_BTHD, logsum = saved
    k_BNKsD, v_BNKsD = cut_keys(k_BTKD, block), cut_keys(v_BTKD, block)
    k_BNKDs, mask = k_BNKsD.swapaxes(3, 4), Mask.of(segments_BT, window, block)
    (batch, _, heads, _), kv_heads = q_BTHD.shape, k_BTKD.shape[2]

    def tile(queries: Queries, given, mask, j, carry):
        (q_KXD, dout_KXD, logsum, delta), (dq, dk, dv), at = given, carry, (queries.row, j)
        here = attend_backward(q_KXD, dout_KXD, logsum, delta, k_BNKsD[at], k_BNKDs[at], v_BNKsD[at], mask)
        return dq + here[0], dk.at[at].add(here[1]), dv.at[at].add(here[2])

    def row(carry, inputs):
        queries, logsum = inputs
        q_KXD, dout_KXD, out_KXD = (queries.cut(x, kv_heads) for x in (q_BTHD, dout_BTHD, out_BTHD))
        given = scaled(q_KXD), dout_KXD, logsum, outputs_share(out_KXD, dout_KXD)
        start = empty_columns(q_KXD.shape), *carry
        dq, *carry = queries.sweep(mask, partial(tile, queries, given), start)
        return tuple(carry), dq

    zeros = jnp.zeros(k_BNKsD.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(row, (zeros, zeros), (mask.queries(heads // kv_heads), logsum))
    dq = scaled(_whole(dq, batch, block)).astype(q_BTHD.dtype)
    return dq, join_keys(dk).astype(k_BTKD.dtype), join_keys(dv).astype(v_BTKD.dtype), None, None


_tiled.defvjp(_forward, _backward)


def _whole(x: jax.Array, batch: int, block: int) -> jax.Array:
    """[B * N, K, D, X], a block of a row after the other, as q is: [B, T, H, D]."""
    return join_queries(x.reshape(batch, -1, *x.shape[1:]), block)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """What decides who sees whom."""

    segments: jax.Array  # int32 [B, N, t]
    window: jax.Array | None

    @classmethod
    def of(cls, segments_BT: jax.Array, window: jax.Array | None, block: int) -> "Mask":
        return cls(segments_BT.reshape(segments_BT.shape[0], -1, block), window)

    def tile(self, queries: "Queries", j: jax.Array) -> jax.Array:
        """[1, s, X]: True where a query sees a key of block j."""
        block = self.segments.shape[2]
        keys = Tokens(j * block + jnp.arange(block), self.segments[queries.row, j][None])
        return visible(queries.tokens, keys, self.window)

    def queries(self, groups: int) -> "Queries":
        """All blocks of queries of all rows, along axis 0. groups: G."""
        batch, count, block = self.segments.shape
        ordered = jnp.where(self.segments == PADDING, LAST, self.segments)  # it stands at the end
        low, high = ordered.min(-1), ordered.max(-1)
        i, j = np.indices((count, count))
        some = (low[:, None, :] <= high[:, :, None]) & (low[:, :, None] <= high[:, None, :])
        alike = (low[:, None, :] == low[:, :, None]) & (high[:, None, :] == low[:, :, None])
        every = (low == high)[:, :, None] & alike
        if self.window is not None:
            some &= (i - j - 1) * block + 1 < self.window
            every &= (i - j + 1) * block - 1 < self.window
        first = jnp.where(some & (j < i), j, i).min(-1)
        whole = jnp.where(~every & (j < i), j + 1, first[..., None]).max(-1)
        row, index = np.indices((batch, count), np.int32)
        shared = jnp.where(low == LAST, 0, jnp.minimum((low == SHARED).sum(-1, keepdims=True), first))
        positions = jnp.broadcast_to(np.arange(count * block, dtype=np.int32).reshape(count, block), ordered.shape)
        tokens = Tokens(positions.reshape(-1, block), self.segments.reshape(-1, 1, block)).spread(groups)
        flat = [jnp.asarray(x, jnp.int32).reshape(-1) for x in (row, index, shared, first, whole)]
        return Queries(tokens, *flat)


class Queries(NamedTuple):
    """One block of queries, and which blocks of its row's keys it sees. Of all blocks: with another axis before."""

    tokens: Tokens
    row: jax.Array
    index: jax.Array  # of the block in its row
    shared: jax.Array  # so many blocks at the row's start are seen for what all segments share
    first: jax.Array  # the first block of keys, after those, that any of them may see
    whole: jax.Array  # from this one on, all of them see all of the blocks before their own

    def cut(self, x_BTHD: jax.Array, kv_heads: int) -> jax.Array:
        """This block of an array like q: [K, X, D].

        Where it is used: of the whole array at once, XLA for CPU takes longer and then copies each block.
        """
        _, _, heads, dim = x_BTHD.shape
        block = self.tokens.positions.shape[-1] * kv_heads // heads
        here = jax.lax.dynamic_slice(x_BTHD, (self.row, self.index * block, 0, 0), (1, block, heads, dim))
        return cut_queries(here, kv_heads, block)[0, 0]

    def sweep(self, mask: Mask, tile: Callable[[jax.Array | None, jax.Array, Any], Any], carry: Any) -> Any:
        """Fold `tile(mask, j, carry)` over the blocks of keys that are seen. mask [1, s, X]; None: all is seen."""
        with jax.named_scope(f"{TRIPS}{(mask.segments.shape[1] - 1) / 2:g}"):
            carry = jax.lax.fori_loop(self.whole, self.index, lambda j, carry: tile(None, j, carry), carry)
        parts = self.shared + self.whole - self.first

        def masked(n, carry):
            j = jnp.where(n < self.shared, n, self.first + n - self.shared)
            j = jnp.where(n < parts, j, self.index)
            return tile(mask.tile(self, j), j, carry)

        with jax.named_scope(f"{TRIPS}1"):
            return jax.lax.fori_loop(0, parts + 1, masked, carry)
