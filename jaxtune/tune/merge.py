"""Merging: what a tuning method put beside the weights added into them, for files that need no adapter."""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxtune import ops
from jaxtune.leaves import Leaf
from jaxtune.models.weights import HOOKS, Tree, leaves_with_path, set_path
from jaxtune.parallel import local
from jaxtune.tune.method import EMBEDDING, get_path


def merged(params: Tree, dtype: Any = None) -> Tree:
    """The tree with the weight that it stands for, computed in float32, in place of each typed leaf.

    Each has its base's dtype and shards; dtype: of those whose base is no floating-point array. The model's settings
    are those that `layout` gave: a head that it untied stays a weight of its own, since head and embedding differ
    from then on; one that it left tied stays tied.
    """
    result: Tree = {}
    shared = params.get(HOOKS, {})
    for path, leaf in leaves_with_path(params):
        leaf = leaf.with_shared(shared) if shared and isinstance(leaf, Leaf) else leaf
        set_path(result, path, _merge(leaf, path == EMBEDDING, dtype) if isinstance(leaf, Leaf) else leaf)
    for path, leaf in leaves_with_path(params):
        bias = leaf.dense_bias() if isinstance(leaf, Leaf) else None
        if bias is not None:
            set_path(result, (*path[:-1], "bias"), bias.astype(get_path(params, (*path[:-1], "bias")).dtype))
    return result


def _merge(leaf: Any, is_table: bool, dtype: Any) -> jax.Array:
    base = getattr(leaf, "base", leaf)
    if isinstance(base, Leaf):
        return _merger(is_table, jnp.dtype(dtype or jnp.float32), None)(leaf)
    return _merger(is_table, base.dtype, base.sharding)(leaf)


@lru_cache(64)
def _merger(is_table: bool, dtype: Any, home: Sharding | None) -> Any:
    """Leaves that are alike, such as those of layers that lie apart, are compiled for once."""
    return jax.jit(partial(_dense, is_table=is_table, dtype=dtype), out_shardings=home)


def _dense(leaf: Any, is_table: bool, dtype: Any) -> jax.Array:
    return ops.dense(jax.tree.map(local.near, leaf), is_table).astype(dtype)
