"""The operations on weights: the one place that looks at the type of a leaf."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import float8
from jaxtune.leaves import Float8, LowRank
from jaxtune.parallel import local


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Noise:
    """Where dropout's randomness comes from: what is dropped of a token depends on `key` and on the token's number
    in its micro-batch, so it is the same on every mesh.

    tokens: the numbers, integers in the shape of the tokens.
    """

    key: jax.Array
    tokens: jax.Array

    def fold_in(self, number: Any) -> "Noise":
        return replace(self, key=jax.random.fold_in(self.key, number))


def linear(x: jax.Array, weight: Any, noise: Noise | None = None, split: str | None = None) -> jax.Array:
    """x W^T, with the weight cast to x's dtype: [..., in] -> [..., out].

    weight: [out, in], or a typed leaf of that shape. noise: of the dropout on a low-rank path; None turns it off.
    split: the mesh axis, if any, over which `in` is split: the result is then this device's part of a sum.
    """
    if isinstance(weight, LowRank):
        return linear(x, weight.base) + low_rank(dropout(x, weight.dropout, noise, split), weight)
    if isinstance(weight, Float8):
        return float8.linear(x, weight)
    return jax.lax.dot_general(x, weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


def low_rank(x: jax.Array, weight: LowRank) -> jax.Array:
    """What a low-rank weight adds to its base: scale * x a b."""
    a, b = weight.a.astype(x.dtype), weight.b.astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    return (_two_products(rows, a, b) * weight.scale.astype(x.dtype)).reshape(*x.shape[:-1], b.shape[-1])


@jax.custom_vjp
def _two_products(x_TI: jax.Array, a_IR: jax.Array, b_RO: jax.Array) -> jax.Array:
    """x a b. Its own backward pass turns the narrow factor of each product round, where XLA for CPU would copy the
    wide one into another order: on a small model those copies took as long as a matmul of the whole layer."""
    return (x_TI @ a_IR) @ b_RO


def _two_products_fwd(x_TI, a_IR, b_RO):
    low_TR = x_TI @ a_IR
    return low_TR @ b_RO, (x_TI, low_TR, a_IR, b_RO)


def _two_products_bwd(residuals, d_TO):
    x_TI, low_TR, a_IR, b_RO = residuals
    d_TR = d_TO @ b_RO.T
    low_RT, d_RT = jax.lax.optimization_barrier((low_TR.T, d_TR.T))
    return d_TR @ a_IR.T, (d_RT @ x_TI).T, low_RT @ d_TO


_two_products.defvjp(_two_products_fwd, _two_products_bwd)


def embed(ids: jax.Array, weight: Any, dtype: Any) -> jax.Array:
    """Rows of the embedding: ids [...] -> [..., features] in `dtype`; zeros for an id that is not in the table.

    Where the vocabulary is split, every other device has zeros: the sum over them is the embedding.
    """
    if isinstance(weight, LowRank):
        low = embed(ids, weight.a, dtype) @ weight.b.astype(dtype)
        return embed(ids, weight.base, dtype) + low * weight.scale.astype(dtype)
    inside = (ids >= 0) & (ids < weight.shape[0])
    return jnp.where(inside[..., None], weight[jnp.where(inside, ids, 0)], 0).astype(dtype)


def dropout(x: jax.Array, rate: float, noise: Noise | None, split: str | None = None) -> jax.Array:
    """x with a share `rate` of its numbers zeroed and the rest scaled up; without noise, x.

    split: the mesh axis over which the last dimension is split.
    """
    if noise is None or rate == 0.0:
        return x
    features = x.shape[-1] * (local.size(split) if split else 1)

    def kept(token):
        return jax.random.bernoulli(jax.random.fold_in(noise.key, token), 1.0 - rate, (features,))

    keep = jax.vmap(kept)(noise.tokens.reshape(-1)).reshape(*x.shape[:-1], features)
    keep = local.part(keep, split, x.ndim - 1) if split else keep
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last dimension, in float32 inside."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return scaled.astype(x.dtype) * weight.astype(x.dtype)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def split_noise(noise: Noise | None, count: int) -> list[Noise | None]:
    """`count` independent ones of one, or as many times None."""
    return [None] * count if noise is None else [noise.fold_in(number) for number in range(count)]
