"""The operations on weights: the one place that looks at the type of a leaf."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import cpu_bfloat16
from jaxtune.leaves import Leaf
from jaxtune.parallel import local

DRAWS = 1 << 32  # of a random number
SALTS = (0x9E3779B9, 0x7F4A7C15)  # of a key's two words, so that no number is 0 to both


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Noise:
    """Where dropout's randomness comes from: what is dropped of a token depends on `key` and on the token's number
    in the batch, so it is the same on every mesh.

    tokens: the numbers, integers in the shape of the tokens.
    """

    key: jax.Array
    tokens: jax.Array

    def fold_in(self, number: Any) -> "Noise":
        """Another one for every number from 0 to 2^31 - 1.

        By hashes, as the draws. A layer asks for twelve, and XLA takes long over jax.random.fold_in, 20 rounds each:
        half the time in which 24 layers without a loop were compiled.
        """
        one, other = jax.random.key_data(self.key)[:2]
        salted = jnp.asarray(number).astype(jnp.uint32) + jnp.array(SALTS, jnp.uint32)
        words = _mixed(jnp.stack([one, other]) ^ _mixed(salted))
        return replace(self, key=jax.random.wrap_key_data(words, impl="threefry2x32"))


def linear(x: jax.Array, weight: Any, noise: Noise | None = None, split: str | None = None) -> jax.Array:
    """x W^T, with the weight cast to x's dtype: [..., in] -> [..., out].

    weight: [out, in], or a typed leaf of that shape. noise: of the dropout on a low-rank path; None turns it off.
    split: the mesh axis, if any, over which `in` is split: the result is then this device's part of a sum.
    """
    return product(inputs(x, weight, noise, split), weight, split)


def inputs(x: jax.Array, weight: Any, noise: Noise | None, split: str | None = None) -> tuple[jax.Array, ...]:
    """The first half of `linear`: what knows of a token's place. The rest may see tokens in any order and number."""
    return weight.inputs(x, noise, split) if isinstance(weight, Leaf) else (x,)


def product(inputs: tuple[jax.Array, ...], weight: Any, split: str | None = None) -> jax.Array:
    """The second half of `linear`."""
    if isinstance(weight, Leaf):
        return weight.product(inputs, split)
    (x,) = inputs
    # As a matrix: where a weight's gradient is a sum over two dimensions, XLA turns the whole of dy round to make one.
    y = cpu_bfloat16.matmul(x.reshape(-1, x.shape[-1]), weight.astype(x.dtype))
    return y.reshape(*x.shape[:-1], -1)


def embed(ids: jax.Array, weight: Any, dtype: Any) -> jax.Array:
    """Rows of the embedding: ids [...] -> [..., features] in `dtype`; zeros for an id that is not in the table.

    Where the vocabulary is split, every other device has zeros: the sum over them is the embedding.
    """
    if isinstance(weight, Leaf):
        return weight.rows(ids, dtype)
    inside = (ids >= 0) & (ids < weight.shape[0])
    return jnp.where(inside[..., None], weight[jnp.where(inside, ids, 0)], 0).astype(dtype)


def dense(weight: Any, is_table: bool = False) -> jax.Array:
    """The weight that an array or a leaf stands for, in float32, of all layers."""
    return weight.dense(is_table) if isinstance(weight, Leaf) else weight.astype(jnp.float32)


def dropout(x: jax.Array, rate: float, noise: Noise | None, split: str | None = None) -> jax.Array:
    """x with a share `rate` of its numbers zeroed and the rest scaled up; without noise, x.

    split: the mesh axis over which the last dimension is split.
    """
    if noise is None or rate == 0.0:
        return x
    first = local.index(split) * x.shape[-1] if split else 0
    dropped = jnp.uint32(min(round(rate * DRAWS), DRAWS - 1))
    keep = _random(noise, first + jnp.arange(x.shape[-1])) >= dropped
    # Scaled behind the choice: XLA for GPUs took a factor of a product and its bias for one of the product alone.
    return jnp.where(keep, x, jnp.zeros((), x.dtype)) / (1.0 - rate)


def _random(noise: Noise, features: jax.Array) -> jax.Array:
    """A uint32 for each token and feature: [tokens' shape, features].

    A counter-based generator (Salmon et al. 2011) as jax.random's is, but of 2 hashes for its 20 rounds: XLA makes
    those of a loop on a CPU, which took 4 % of a layer's time, and these a part of what uses them.
    """
    one, other = jax.random.key_data(noise.key)[:2]
    tokens = noise.tokens.astype(jnp.uint32)[..., None]
    return _mixed(_mixed(features.astype(jnp.uint32) ^ _mixed(tokens ^ one)) ^ _mixed(tokens ^ other))


def _mixed(x: jax.Array) -> jax.Array:
    """fmix32, with which MurmurHash3 ends: one to one, and a changed bit changes every other with a chance of half."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


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
