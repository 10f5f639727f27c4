"""One tile of attention: a block of queries with a block of keys, forward and backward.

Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867; its backward pass from the logarithm of the sum:
Dao et al. 2022, arXiv 2205.14135, appendix B. Which tiles there are is tiled.py's business for a whole sequence, and
parallel/ring.py's for one that is split.

A tile has its keys along the rows and its queries along the columns: then every product is of matrices as they lie in
memory, of which only narrow ones are turned round, and maxima and sums run down columns. XLA for CPU would else copy
tiles of scores into another order, which costs as much as multiplying them.

Legend: B batch, T tokens, H query heads, K key/value heads, G = H / K, D head size, N blocks of a sequence, t tokens of
a block, s keys of a tile (as many), X = G * t, the queries that share a key head; R = K, or B * K where all rows of a
batch are dealt with at once. Statistics and sums are float32.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LOWEST = -1e30  # not -inf, of which exp is slow


class Partial(NamedTuple):
    """Attention to the keys met so far."""

    out: jax.Array  # [R, D, X], not yet divided by `total`
    peak: jax.Array  # [R, X], the largest score
    total: jax.Array  # [R, X], sum of exp(score - peak)

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Partial":
        """shape: [..., D, X]."""
        statistic = jnp.zeros((*shape[:-2], shape[-1]), jnp.float32)
        return cls(jnp.zeros(shape, jnp.float32), statistic + LOWEST, statistic)

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """The output, and the logarithm of the sum of exp(score); zeros where a query saw nothing."""
        total = jnp.where(self.total > 0, self.total, 1.0)
        logsum = jnp.where(self.total > 0, self.peak + jnp.log(total), 0.0)
        return self.out / total[..., None, :], logsum


def attend(part: Partial, q_RDX, k_RsD, v_RDs, mask_Bst) -> Partial:
    """The block of queries, which are scaled, with a block of keys added to what it has met.

    mask: True where a query sees a key; None: it sees all of them.
    """
    scores = _dot("rsd,rdx->rsx", k_RsD, q_RDX)
    peak = jnp.maximum(part.peak, _columns(jnp.max, _masked(scores, mask_Bst, LOWEST)))
    # Masked after the exponential: those of scores far below are slow.
    weights = _masked(jnp.exp(jnp.minimum(scores - peak[:, None], 0.0)), mask_Bst, 0.0)
    fade = jnp.exp(part.peak - peak)
    out = _dot("rds,rsx->rdx", v_RDs, weights.reshape(scores.shape).astype(v_RDs.dtype))
    return Partial(part.out * fade[:, None] + out, peak, part.total * fade + _columns(jnp.sum, weights))


def attend_backward(q_RDX, dout_RDX, logsum_RX, delta_RX, k_RsD, k_RDs, v_RsD, mask_Bst):
    """Gradients, in float32, of the scaled queries [R, D, X], of the keys and of the values [R, s, D].

    dout: of the output. delta: what `outputs_share` gives. k_RDs: the keys turned round.
    """
    scores = _dot("rsd,rdx->rsx", k_RsD, q_RDX)
    weights = _masked(jnp.exp(jnp.minimum(scores - logsum_RX[:, None], 0.0)), mask_Bst, 0.0).reshape(scores.shape)
    dweights = _dot("rsd,rdx->rsx", v_RsD, dout_RDX)
    dscores = (weights * (dweights - delta_RX[:, None])).astype(q_RDX.dtype)
    dv = _dot("rsx,rxd->rsd", weights.astype(dout_RDX.dtype), dout_RDX.swapaxes(1, 2))
    dk = _dot("rsx,rxd->rsd", dscores, q_RDX.swapaxes(1, 2))
    return _dot("rds,rsx->rdx", k_RDs, dscores), dk, dv


def scaled(q: jax.Array) -> jax.Array:
    """Queries as a tile takes them, or their gradient as attention gives it."""
    return q * (1.0 / math.sqrt(q.shape[-1]))


def outputs_share(out_RDX: jax.Array, dout_RDX: jax.Array) -> jax.Array:
    """Sum over D of the output times its gradient, [R, X].

    Of blocks as they are cut: along rows of D numbers XLA for CPU sums ten times as slowly as down columns.
    """
    return (out_RDX.astype(jnp.float32) * dout_RDX.astype(jnp.float32)).sum(-2)


def cut_queries(x_BTHD: jax.Array, kv_heads: int, block: int) -> jax.Array:
    """Cut into blocks, those that share a key head side by side: [B, N, K, D, X]."""
    batch, time, heads, dim = x_BTHD.shape
    split = x_BTHD.reshape(batch, time // block, block, kv_heads, heads // kv_heads, dim)
    return split.transpose(0, 1, 3, 5, 4, 2).reshape(batch, -1, kv_heads, dim, heads // kv_heads * block)


def join_queries(x_BNKDX: jax.Array, block: int) -> jax.Array:
    """Back: [B, T, H, D]."""
    batch, blocks, kv_heads, dim, _ = x_BNKDX.shape
    split = x_BNKDX.reshape(batch, blocks, kv_heads, dim, -1, block)
    return split.transpose(0, 1, 5, 2, 4, 3).reshape(batch, blocks * block, -1, dim)


def cut_keys(x_BTKD: jax.Array, block: int) -> jax.Array:
    """Cut into blocks: [B, N, K, s, D]."""
    batch, time, heads, dim = x_BTKD.shape
    return x_BTKD.reshape(batch, time // block, block, heads, dim).transpose(0, 1, 3, 2, 4)


def join_keys(x_BNKsD: jax.Array) -> jax.Array:
    """Back: [B, T, K, D]."""
    batch, blocks, heads, block, dim = x_BNKsD.shape
    return x_BNKsD.transpose(0, 1, 3, 2, 4).reshape(batch, blocks * block, heads, dim)


def _masked(x_RsX: jax.Array, mask_Bst: jax.Array | None, other: float) -> jax.Array:
    """[B, K, s, G, t] where there is a mask, for whoever sums it: a loop over that form XLA for CPU vectorises, and one
    over [R, s, X], with the exponential in it, it does not (0.05 ms a tile, and 0.3)."""
    if mask_Bst is None:
        return x_RsX
    rows, block = mask_Bst.shape[0], mask_Bst.shape[2]
    split = x_RsX.reshape(rows, -1, x_RsX.shape[1], x_RsX.shape[2] // block, block)
    return jnp.where(mask_Bst[:, None, :, None], split, other)


def _columns(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Over the keys of what `_masked` gives: [R, X]."""
    if x.ndim == 3:
        return reduce(x, 1)
    batch, heads, _, groups, block = x.shape
    return reduce(x, 2).reshape(batch * heads, groups * block)


def _dot(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)
