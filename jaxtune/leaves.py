"""What a typed leaf of the parameter tree is, and the trees that have them. Each kind of leaf is a class of its own
beside what it is for; `ops.py` is the only code that asks them to compute.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, ClassVar

import jax

from jaxtune.models.weights import Tree

# The logical axis of a dimension; several where it is split along each of them, the first one outermost.
Axis = str | None | tuple[str, ...]
Axes = tuple[Axis, ...]


class Leaf:
    """A weight that is more than one array: what a tuning method or a narrow number format puts in its place.

    A subclass is a frozen dataclass that is registered as a pytree. `base`, where it has one, is the weight below it:
    an array or another leaf. Of a stack of layers, axis 0 of every part is the layer. Inside a layer, `inputs` and
    `product` see one layer's parts, and of these what this device has along the tensor axis.

    TRAINS: names of the parts that train. EXACT: of those that keep their type, whatever the computation's.
    """

    TRAINS: ClassVar[frozenset[str]] = frozenset()
    EXACT: ClassVar[frozenset[str]] = frozenset()

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        """The logical axes of every part but `base`. A part that is left out is whole everywhere, and left alone.

        axes: of the weight that this leaf stands for, "layers" first where it is a stack. is_table: its rows are
        looked up, so that the first axis is what goes in.
        """
        raise NotImplementedError

    def inputs(self, x: Any, noise: Any, split: str | None) -> tuple[Any, ...]:
        """What `product` needs of x [..., in]: everything that depends on where a token stands, dropout say."""
        return (x,)

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        """x W^T, [..., in] -> [..., out] in x's type. split: as in ops.linear: then a part of a sum over the axis."""
        raise NotImplementedError

    def rows(self, ids: Any, dtype: Any) -> Any:
        """Rows of an embedding: ids [...] -> [..., features]; zeros for an id that is not in the table."""
        raise NotImplementedError

    def dense(self, is_table: bool) -> Any:
        """The weight that it stands for, as one float32 array, of all layers: for files that know no leaves."""
        raise NotImplementedError

    def size(self) -> int:
        """Numbers of the weight and of what lies beside it; of parts that are None, none."""
        return sum(count(getattr(self, name)) for name in fields_of(self))


def dim_of(axes: Axes, name: str) -> int | None:
    """The dimension that lies along a logical axis; None where none does."""
    found = (dim for dim, axis in enumerate(axes) if axis == name or (isinstance(axis, tuple) and name in axis))
    return next(found, None)


def fields_of(leaf: Leaf) -> list[str]:
    """The names of a leaf's parts: its fields that are not static."""
    return [field.name for field in fields(leaf) if not field.metadata.get("static")]  # type: ignore[arg-type]


def map_parts(function: Callable[[Any, Axes, bool], Any], leaf: Any, axes: Axes, is_table: bool = False) -> Any:
    """`function` of (array, its logical axes, whether it keeps its type) for every array of a leaf, in the leaf's
    structure. A None stays, and so does a part without axes.

    axes: of the weight that the leaf stands for. is_table: its rows are looked up.
    """
    if leaf is None:
        return None
    if not isinstance(leaf, Leaf):
        return function(leaf, axes, False)
    changed = {}
    for name, own in leaf.axes(axes, is_table).items():
        part = getattr(leaf, name)
        changed[name] = None if part is None else function(part, own, name in leaf.EXACT)
    if hasattr(leaf, "base"):
        changed["base"] = map_parts(function, leaf.base, axes, is_table)
    return replace(leaf, **changed)  # type: ignore[type-var]


def mask_of(leaf: Leaf) -> Leaf:
    """The leaf with, for every array, whether it trains."""
    flags = {
        name: jax.tree.map(lambda _, train=name in leaf.TRAINS: train, getattr(leaf, name)) for name in fields_of(leaf)
    }
    return replace(leaf, **flags)  # type: ignore[type-var]


def rebased(leaf: Any, function: Callable[[Any], Any]) -> Any:
    """The leaf with `function` of the weight at its bottom: an array, or a leaf that lies on no other."""
    if isinstance(leaf, Leaf) and hasattr(leaf, "base"):
        return replace(leaf, base=rebased(leaf.base, function))  # type: ignore[type-var]
    return function(leaf)


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


def count(tree: Any) -> int:
    """Numbers in a tree, those that quantised weights stand for included."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda value: isinstance(value, Leaf))
    return sum(leaf.size() if isinstance(leaf, Leaf) else leaf.size for leaf in leaves)
