"""Causal attention of a whole sequence with itself, one tile of the scores at a time, and its gradient likewise.

Tiles that the segments, the window or causality hide are never computed, and those that they leave whole are not
masked. Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867; its backward pass from the logarithm of the sum:
Dao et al. 2022, arXiv 2205.14135, appendix B.

A tile has its keys along the rows and its queries along the columns: then every product is of matrices as they lie in
memory, of which only narrow ones are turned round, and maxima and sums run down columns. XLA for CPU would else copy
tiles of scores into another order, which costs as much as multiplying them.

Legend: B batch, T tokens, H query heads, K key/value heads, G = H / K, D head size, N blocks of a sequence, t tokens of
a block, s keys of a tile (as many), X = G * t, the queries that share a key head. Statistics and sums are float32.
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

SAVED = "attended"  # the checkpoint name of what the backward pass needs beside queries, keys and values
BLOCK = 128  # tokens at most; measured: a tile's scores have to fit into a CPU's caches
ALIGN = 8
TRIPS = "trips_"  # in the name of a loop: how long it is in the mean where a row is one document, for who counts
LOWEST = -1e30  # not -inf, of which exp is slow
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
    cut = _Cut(q_BTHD.shape, k_BTKD.shape[2], block)
    k_BNKsD, v_BNKDs = cut.keys(k_BTKD), cut.keys(v_BTKD).swapaxes(3, 4)
    mask = Mask.of(segments_BT, window, block)

    def tile(queries: Queries, q_KDX, mask, j, part):
        return _attend(part, q_KDX, k_BNKsD[queries.row, j], v_BNKDs[queries.row, j], mask)

    def row(_, inputs):
        queries, q_KDX = inputs
        part = queries.sweep(mask, partial(tile, queries, q_KDX), Partial.empty(q_KDX.shape))
        return None, part.finish()

    _, (out, logsum) = jax.lax.scan(row, None, (mask.queries(), cut.queries(_scaled(q_BTHD))))
    out, logsum = (checkpoint_name(x, SAVED) for x in (cut.whole(out).astype(v_BTKD.dtype), logsum))
    return out, (q_BTHD, k_BTKD, v_BTKD, segments_BT, window, out, logsum)


def _backward(block, saved, dout_BTHD):
    q_BTHD, k_BTKD, v_BTKD, segments_BT, window, out_BTHD, logsum = saved
    cut = _Cut(q_BTHD.shape, k_BTKD.shape[2], block)
    k_BNKsD, v_BNKsD = cut.keys(k_BTKD), cut.keys(v_BTKD)
    k_BNKDs, mask = k_BNKsD.swapaxes(3, 4), Mask.of(segments_BT, window, block)
    products = out_BTHD.astype(jnp.float32) * dout_BTHD.astype(jnp.float32)
    delta = cut.queries(products.sum(-1, keepdims=True))[:, :, 0]

    def tile(queries: Queries, given, mask, j, carry):
        (q_KDX, dout_KDX, logsum, delta), (dq, dk, dv), at = given, carry, (queries.row, j)
        here = _attend_backward(q_KDX, dout_KDX, logsum, delta, k_BNKsD[at], k_BNKDs[at], v_BNKsD[at], mask)
        return dq + here[0], dk.at[at].add(here[1]), dv.at[at].add(here[2])

    def row(carry, inputs):
        queries, q_KDX, *rest = inputs
        start = jnp.zeros(q_KDX.shape, jnp.float32), *carry
        dq, *carry = queries.sweep(mask, partial(tile, queries, (q_KDX, *rest)), start)
        return tuple(carry), dq

    zeros = jnp.zeros(k_BNKsD.shape, jnp.float32)
    given = mask.queries(), cut.queries(_scaled(q_BTHD)), cut.queries(dout_BTHD), logsum, delta
    (dk, dv), dq = jax.lax.scan(row, (zeros, zeros), given)
    dq = _scaled(cut.whole(dq)).astype(q_BTHD.dtype)
    return dq, cut.whole_keys(dk).astype(k_BTKD.dtype), cut.whole_keys(dv).astype(v_BTKD.dtype), None, None


_tiled.defvjp(_forward, _backward)


class Partial(NamedTuple):
    """Attention to the keys met so far."""

    out: jax.Array  # [K, D, X], not yet divided by `total`
    peak: jax.Array  # [K, X], the largest score
    total: jax.Array  # [K, X], sum of exp(score - peak)

    @classmethod
    def empty(cls, shape: tuple[int, int, int]) -> "Partial":
        statistic = jnp.zeros((shape[0], shape[2]), jnp.float32)
        return cls(jnp.zeros(shape, jnp.float32), statistic + LOWEST, statistic)

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """The output, and the logarithm of the sum of exp(score). Every query has seen itself at least."""
        return self.out / self.total[:, None], self.peak + jnp.log(self.total)


def _attend(part: Partial, q_KDX, k_KsD, v_KDs, mask) -> Partial:
    """The block of queries, with a block of keys added to what it has met. mask: None: it sees all of them."""
    scores = _dot("ksd,kdx->ksx", k_KsD, q_KDX)
    peak = jnp.maximum(part.peak, _masked(scores, mask, LOWEST).max(1))
    # Masked after the exponential: those of scores far below are slow.
    weights = _masked(jnp.exp(jnp.minimum(scores - peak[:, None], 0.0)), mask, 0.0)
    fade = jnp.exp(part.peak - peak)
    out = _dot("kds,ksx->kdx", v_KDs, weights.astype(v_KDs.dtype))
    return Partial(part.out * fade[:, None] + out, peak, part.total * fade + weights.sum(1))


def _attend_backward(q_KDX, dout_KDX, logsum_KX, delta_KX, k_KsD, k_KDs, v_KsD, mask):
    """Gradients, in float32, of the scaled queries [K, D, X], of the keys and of the values [K, s, D].

    dout: of the output. delta: sum over D of output times dout.
    """
    scores = _dot("ksd,kdx->ksx", k_KsD, q_KDX)
    weights = _masked(jnp.exp(jnp.minimum(scores - logsum_KX[:, None], 0.0)), mask, 0.0)
    dweights = _dot("ksd,kdx->ksx", v_KsD, dout_KDX)
    dscores = (weights * (dweights - delta_KX[:, None])).astype(q_KDX.dtype)
    dv = _dot("ksx,kxd->ksd", weights.astype(dout_KDX.dtype), dout_KDX.swapaxes(1, 2))
    dk = _dot("ksx,kxd->ksd", dscores, q_KDX.swapaxes(1, 2))
    return _dot("kds,ksx->kdx", k_KDs, dscores), dk, dv


def _masked(x_KsX: jax.Array, mask_st: jax.Array | None, other: float) -> jax.Array:
    if mask_st is None:
        return x_KsX
    heads, keys, _ = x_KsX.shape
    split = x_KsX.reshape(heads, keys, -1, mask_st.shape[1])
    return jnp.where(mask_st[None, :, None], split, other).reshape(x_KsX.shape)


def _dot(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _scaled(q: jax.Array) -> jax.Array:
    return q * (1.0 / math.sqrt(q.shape[-1]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """What decides who sees whom."""

    segments: jax.Array  # int32 [B, N, t]
    window: jax.Array | None

    @classmethod
    def of(cls, segments_BT: jax.Array, window: jax.Array | None, block: int) -> "Mask":
        return cls(segments_BT.reshape(segments_BT.shape[0], -1, block), window)

    def tile(self, row: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """[s, t]: True where a query of block i sees a key of block j."""
        segments, block = self.segments[row], self.segments.shape[2]
        distance = (i - j) * block + jnp.arange(block)[None, :] - jnp.arange(block)[:, None]
        seen = (distance >= 0) & (segments[j][:, None] == segments[i][None, :])
        return seen if self.window is None else seen & (distance < self.window)

    def queries(self) -> "Queries":
        """All blocks of queries of all rows, along axis 0."""
        batch, count, block = self.segments.shape
        ordered = jnp.where(self.segments == 0, LAST, self.segments)  # padding stands at the end
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
        return Queries(*(jnp.asarray(x, jnp.int32).reshape(-1) for x in (row, index, first, whole)))


class Queries(NamedTuple):
    """One block of queries, and which blocks of its row's keys it sees."""

    row: jax.Array
    index: jax.Array  # of the block in its row
    first: jax.Array  # the first block of keys that any of them may see
    whole: jax.Array  # from this one on, all of them see all of the blocks before their own

    def sweep(self, mask: Mask, tile: Callable[[jax.Array | None, jax.Array, Any], Any], carry: Any) -> Any:
        """Fold `tile(mask, j, carry)` over the blocks of keys that are seen. mask [s, t]; None: all is seen."""
        with jax.named_scope(f"{TRIPS}{(mask.segments.shape[1] - 1) / 2:g}"):
            carry = jax.lax.fori_loop(self.whole, self.index, lambda j, carry: tile(None, j, carry), carry)
        parts = self.whole - self.first

        def masked(n, carry):
            j = jnp.where(n < parts, self.first + n, self.index)
            return tile(mask.tile(self.row, self.index, j), j, carry)

        with jax.named_scope(f"{TRIPS}1"):
            return jax.lax.fori_loop(0, parts + 1, masked, carry)


@dataclass(frozen=True)
class _Cut:
    """How arrays are cut into blocks: queries to [B * N, K, D, X], keys to [B, N, K, s, D]."""

    shape: tuple[int, ...]  # of the queries, [B, T, H, D]
    kv_heads: int
    block: int

    def queries(self, x_BTHD: jax.Array) -> jax.Array:
        batch, time, heads, dim = x_BTHD.shape
        groups = heads // self.kv_heads
        split = x_BTHD.reshape(batch, time // self.block, self.block, self.kv_heads, groups, dim)
        return split.transpose(0, 1, 3, 5, 4, 2).reshape(-1, self.kv_heads, dim, groups * self.block)

    def whole(self, x: jax.Array) -> jax.Array:
        """Back from queries."""
        batch, time, heads, dim = self.shape
        split = x.reshape(batch, time // self.block, self.kv_heads, dim, heads // self.kv_heads, self.block)
        return split.transpose(0, 1, 5, 2, 4, 3).reshape(self.shape)

    def keys(self, x_BTKD: jax.Array) -> jax.Array:
        batch, time, heads, dim = x_BTKD.shape
        return x_BTKD.reshape(batch, time // self.block, self.block, heads, dim).transpose(0, 1, 3, 2, 4)

    def whole_keys(self, x_BNKsD: jax.Array) -> jax.Array:
        """Back from keys."""
        batch, blocks, heads, block, dim = x_BNKsD.shape
        return x_BNKsD.transpose(0, 1, 3, 2, 4).reshape(batch, blocks * block, heads, dim)
