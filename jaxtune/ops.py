"""The operations on weights: the one place that looks at the type of a leaf."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.leaves import LowRank


def linear(x: jax.Array, weight: Any, bias: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
    """x W^T + bias, with the weights cast to x's dtype: [..., in] -> [..., out].

    weight: [out, in], or a typed leaf of that shape. key: of the dropout on a low-rank path; None turns it off.
    """
    if isinstance(weight, LowRank):
        y = linear(x, weight.base) + low_rank(dropout(x, weight.dropout, key), weight)
    else:
        y = jax.lax.dot_general(x, weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
    return y if bias is None else y + bias.astype(x.dtype)


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
    """Rows of the embedding: ids [...] -> [..., features] in `dtype`.

    Ids outside the table do not raise in JAX: callers check them against the vocabulary beforehand.
    """
    if isinstance(weight, LowRank):
        low = weight.a[ids].astype(dtype) @ weight.b.astype(dtype)
        return embed(ids, weight.base, dtype) + low * weight.scale.astype(dtype)
    return weight[ids].astype(dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with a share `rate` of its numbers zeroed and the rest scaled up; without a key, x."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
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


def split_keys(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """`count` keys of one, or as many times None."""
    return [None] * count if key is None else list(jax.random.split(key, count))
