"""Typed leaves of the parameter tree. `ops.py` is the only code that looks inside them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.models.weights import Tree

Axes = tuple[str | None, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """W + scale * (a b)^T, never formed. Axis 0 of each part is the layer where W is a stack.

    base: [out, in] (of an embedding: [vocab, features], which `in` and `out` then name in this order)
    a: [in, rank]; b: [rank, out]; scale: scalar. Layers of a stack that have a smaller rank, or none,
    hold zeros in the columns of `a` and rows of `b` that they lack: both gradients are zero there.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    dropout: float = field(default=0.0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Float8:
    """W, whose matmuls run in float8 (float8.py). It stands in the tree that a pass is given, never in the state.

    base: [out, in]; scales: [3], of input, weight and output gradient, from before this step; None: from the tensors
    themselves. Axis 0 of each part is the layer where W is a stack.
    """

    base: Any
    scales: jax.Array | None = None


def is_leaf(value: Any) -> bool:
    return isinstance(value, (LowRank, Float8))


def map_parts(function: Callable[[Any, Axes], Any], leaf: Any, axes: Axes, is_table: bool = False) -> Any:
    """`function` of (array, its logical axes) for every array of a leaf, in the leaf's structure; a None stays, and
    so do the scales of a Float8.

    axes: of the weight that the leaf stands for. is_table: its rows are looked up, so the first axis is `in`.
    """
    if isinstance(leaf, Float8):
        return replace(leaf, base=map_parts(function, leaf.base, axes, is_table))
    if not isinstance(leaf, LowRank):
        return None if leaf is None else function(leaf, axes)
    *layers, first, second = axes
    in_axis, out_axis = (first, second) if is_table else (second, first)
    return replace(
        leaf,
        base=map_parts(function, leaf.base, axes, is_table),
        a=map_parts(function, leaf.a, (*layers, in_axis, "rank")),
        b=map_parts(function, leaf.b, (*layers, "rank", out_axis)),
        scale=map_parts(function, leaf.scale, tuple(layers)),
    )


def partition(params: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """(trainable, frozen): two trees of the same structure, with None where the other has the array.

    mask: the tree of `params` with a bool for every array, the parts of typed leaves too.
    """
    trainable = jax.tree.map(lambda array, train: array if train else None, params, mask)
    frozen = jax.tree.map(lambda array, train: None if train else array, params, mask)
    return trainable, frozen


def combine(trainable: Tree, frozen: Tree) -> Tree:
    """The whole tree again."""
    pick = lambda mine, other: other if mine is None else mine  # noqa: E731
    return jax.tree.map(pick, trainable, frozen, is_leaf=lambda value: value is None)


def count(tree: Tree) -> int:
    """Numbers in the arrays of a tree."""
    return sum(jnp.size(array) for array in jax.tree.leaves(tree))
