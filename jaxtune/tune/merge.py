"""Merging: adapters added into the weights that they sit on, for files that need no adapter."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.leaves import LowRank
from jaxtune.models.weights import Tree, leaves_with_path, set_path
from jaxtune.tune.method import EMBEDDING


def merged(params: Tree) -> Tree:
    """The tree with W + scale (a b)^T, computed in float32, in place of each adapted W, in W's dtype and shards.

    The model's settings are those that `layout` gave: a head that it untied stays a weight of its own, since
    head and embedding differ from then on; one that it left tied stays tied.
    """
    result: Tree = {}
    for path, leaf in leaves_with_path(params):
        set_path(result, path, _merge(leaf, path == EMBEDDING) if isinstance(leaf, LowRank) else leaf)
    return result


def _merge(leaf: LowRank, is_embedding: bool) -> jax.Array:
    add = jax.jit(partial(_add, is_embedding=is_embedding), out_shardings=leaf.base.sharding)
    return add(leaf.base, leaf.a, leaf.b, leaf.scale)


def _add(base: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, is_embedding: bool) -> Any:
    form = "...ir,...ro->...io" if is_embedding else "...ir,...ro->...oi"
    delta = jnp.einsum(form, a, b, precision=jax.lax.Precision.HIGHEST)
    return (base.astype(jnp.float32) + scale[..., None, None] * delta).astype(base.dtype)
