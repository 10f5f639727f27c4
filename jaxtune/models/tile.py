"""One tile of attention: a block of queries with a block of keys, forward and backward.

Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867; its backward pass from the logarithm of the sum:
Dao et al. 2022, arXiv 2205.14135, appendix B. Which tiles there are is tiled.py's business for a whole sequence, and
parallel/ring.py's for one that is split.

A tile has its keys along the rows and its queries along the columns: then every product is of matrices as they lie in
memory, of which only narrow ones are turned round, and maxima and sums run down columns. XLA for CPU would else copy
tiles of scores into another order, which costs as much as multiplying them. A mask is made in that order too, from what
is known of each of the X queries: spread out from t of them it would take six times as long, for XLA counts out places.
Queries come in as rows of D numbers, which is how they lie in a sequence, and what is made for them goes out as
columns. Heads that share a key head are neighbours, the tokens of a block are not: so few cache lines are read at once
where one order is made of the other.

Legend: B batch, T tokens, H query heads, K key/value heads, G = H / K, D head size, N blocks of a sequence, t tokens of
a block, s keys of a tile (as many), X = t * G, the queries that share a key head; R = K, or B * K where all rows of a
batch are dealt with at once. Statistics and sums are float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.segments import sees

LOWEST = -1e30  # not -inf, of which exp is slow


class Tokens(NamedTuple):
    """What a mask asks of the tokens of a block; N: of all blocks."""

    positions: jax.Array  # int32 [t], [N, t], or of queries [..., X]
    segments: jax.Array  # int32 [B, t], [N, B, t] or [..., B, X]

    def spread(self, groups: int) -> "Tokens":
        """Of queries: each of t tokens for all of the heads that share a key head, X in all."""
        return Tokens(*(jnp.repeat(x, groups, axis=-1) for x in self))


def visible(queries: Tokens, keys: Tokens, window: jax.Array | None) -> jax.Array:
    """The mask of a tile, [B, s, X]: True where a query sees a key. window: as in jaxtune.segments.sees."""
    distance = queries.positions[None, :] - keys.positions[:, None]
    return sees(queries.segments[:, None, :], keys.segments[:, :, None], distance, window)


class Partial(NamedTuple):
    """Attention to the keys met so far."""

    out: jax.Array  # [R, D, X], not yet divided by `total`
    peak: jax.Array  # [R, X], the largest score
    total: jax.Array  # [R, X], sum of exp(score - peak)

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Partial":
        """shape: of the queries, [..., X, D]."""
        statistic = jnp.zeros(shape[:-1], jnp.float32)
        return cls(empty_columns(shape), statistic + LOWEST, statistic)

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """The output, and the logarithm of the sum of exp(score); zeros where a query saw nothing."""
        total = jnp.where(self.total > 0, self.total, 1.0)
        logsum = jnp.where(self.total > 0, self.peak + jnp.log(total), 0.0)
        return self.out / total[..., None, :], logsum


def empty_columns(shape: tuple[int, ...]) -> jax.Array:
    """Zeros in float32, [..., D, X], for queries of that shape, [..., X, D]."""
    *outer, queries, dim = shape
    return jnp.zeros((*outer, dim, queries), jnp.float32)


def attend(part: Partial, q_RXD, k_RsD, v_RDs, mask_BsX) -> Partial:
    """The block of queries, which are scaled, with a block of keys added to what it has met.

    mask: True where a query sees a key; None: it sees all of them.
    """
    scores = _dot("rsd,rxd->rsx", k_RsD, q_RXD)
    peak = jnp.maximum(part.peak, _masked(scores, mask_BsX, LOWEST).max(1))
    # Masked after the exponential: those of scores far below are slow.
    weights = _masked(jnp.exp(jnp.minimum(scores - peak[:, None], 0.0)), mask_BsX, 0.0)
    fade = jnp.exp(part.peak - peak)
    out = _dot("rds,rsx->rdx", v_RDs, weights.astype(v_RDs.dtype))
    return Partial(part.out * fade[:, None] + out, peak, part.total * fade + weights.sum(1))


def attend_backward(q_RXD, dout_RXD, logsum_RX, delta_RX, k_RsD, k_RDs, v_RsD, mask_BsX):
    """Gradients, in float32, of the scaled queries [R, D, X], of the keys and of the values [R, s, D].

    dout: of the output. delta: what `outputs_share` gives. k_RDs: the keys turned round.
    """
    scores = _dot("rsd,rxd->rsx", k_RsD, q_RXD)
    weights = _masked(jnp.exp(jnp.minimum(scores - logsum_RX[:, None], 0.0)), mask_BsX, 0.0)
    dweights = _dot("rsd,rxd->rsx", v_RsD, dout_RXD)
    dscores = (weights * (dweights - delta_RX[:, None])).astype(q_RXD.dtype)
    dv = _dot("rsx,rxd->rsd", weights.astype(dout_RXD.dtype), dout_RXD)
    dk = _dot("rsx,rxd->rsd", dscores, q_RXD)
    return _dot("rds,rsx->rdx", k_RDs, dscores), dk, dv


def scaled(q: jax.Array) -> jax.Array:
    """Queries as a tile takes them, or their gradient as attention gives it: [..., D]."""
    return q * (1.0 / math.sqrt(q.shape[-1]))


def outputs_share(out_RXD: jax.Array, dout_RXD: jax.Array) -> jax.Array:
    """Sum over D of the output times its gradient, float32 [R, X].

    A product with ones, exact on every device: XLA for CPU sums rows of D numbers more slowly, and columns too.
    """
    products = out_RXD.astype(jnp.float32) * dout_RXD.astype(jnp.float32)
    ones = jnp.ones((products.shape[-1], 1), jnp.float32)
    return jnp.matmul(products, ones, precision=jax.lax.Precision.HIGHEST)[..., 0]


def cut_queries(x_BTHD: jax.Array, kv_heads: int, block: int) -> jax.Array:
    """Cut into blocks, those that share a key head side by side: [B, N, K, X, D]."""
    batch, time, heads, dim = x_BTHD.shape
    split = x_BTHD.reshape(batch, time // block, block, kv_heads, heads // kv_heads, dim)
    return split.swapaxes(2, 3).reshape(batch, -1, kv_heads, block * (heads // kv_heads), dim)


def join_queries(x_BNKDX: jax.Array, block: int) -> jax.Array:
    """What a tile made for cut queries: [B, T, H, D]."""
    batch, blocks, kv_heads, dim, _ = x_BNKDX.shape
    split = x_BNKDX.reshape(batch, blocks, kv_heads, dim, block, -1)
    return split.transpose(0, 1, 4, 2, 5, 3).reshape(batch, blocks * block, -1, dim)


def cut_keys(x_BTKD: jax.Array, block: int) -> jax.Array:
    """Cut into blocks: [B, N, K, s, D]."""
    batch, time, heads, dim = x_BTKD.shape
    return x_BTKD.reshape(batch, time // block, block, heads, dim).transpose(0, 1, 3, 2, 4)


def join_keys(x_BNKsD: jax.Array) -> jax.Array:
    """Back: [B, T, K, D]."""
    batch, blocks, heads, block, dim = x_BNKsD.shape
    return x_BNKsD.transpose(0, 1, 3, 2, 4).reshape(batch, blocks * block, heads, dim)


def _masked(x_RsX: jax.Array, mask_BsX: jax.Array | None, other: float) -> jax.Array:
    """`other` where the mask is False."""
    if mask_BsX is None:
        return x_RsX
    return jnp.where(jnp.repeat(mask_BsX, x_RsX.shape[0] // mask_BsX.shape[0], axis=0), x_RsX, other)


def _dot(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)
