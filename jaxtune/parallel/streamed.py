"""An update of arrays that lie on the host: one layer of a stack after another, one other array after another, so that
the device holds the moments of no more than that.

XLA fetches as early as it may, and looks through jax.lax.optimization_barrier. So each piece is a loop of its own: what
a round takes is fetched in it, and what it gives takes its place in the host's buffer.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.models.weights import Tree
from jaxtune.parallel.offload import fetched, is_away, stored

Part = Callable[[Tree | None], Tree | None]  # a tree as what trains, with None for what is not of the piece
# (params, optimiser state, gradients, numbers by layer, part) -> (params, state) after the step
Move = Callable[[Tree, Any, Tree, Any, Part], tuple[Tree, Any]]


def any_away(*homes: Any) -> bool:
    """Whether some array lies on the host."""
    return any(map(is_away, jax.tree.leaves(homes)))


def streamed(
    move: Move, before: tuple[Tree, Any], homes: tuple[Tree, Any], grads: Tree, by_layer: Any, finite: jax.Array
) -> tuple[Tree, Any]:
    """(params, optimiser state) after `move` of one piece after another; where not finite, as they were.

    They lie at `homes` before and after. by_layer: arrays, each with the layers along dimension 0. A state's
    dicts are trees as what trains; anything else in it is a counter, which every piece sees as it was.
    """
    shared = _nodes(fetched, before, homes, of_trees=False)
    after, whole = shared, jax.tree.structure(before[0])
    for members, layers in _pieces(before[0], homes[0]):
        part = partial(_part, whole, members)

        def one(index: jax.Array, carry: tuple[Tree, Any], part: Part = part, layers: int = layers) -> tuple[Tree, Any]:
            cut = partial(jax.tree.map, partial(_cut, index)) if layers else lambda tree: tree
            put = partial(jax.tree.map, partial(_put, index)) if layers else lambda old, new: new
            old = _nodes(lambda tree, home: fetched(cut(tree), part(home)), carry, homes)
            params, moments = _nodes(lambda _, counter: counter, old, shared, of_trees=False)
            new = move(params, moments, cut(part(grads)), cut(by_layer), part)
            return _nodes(lambda tree, own, home: put(own, stored(tree, part(home))), new, carry, homes)

        rounds = jnp.where(finite, layers or 1, 0)
        done = jax.lax.fori_loop(0, rounds, one, _nodes(part, after))
        after = _nodes(partial(_joined, whole, members), done, after)
    return _nodes(stored, after, homes, of_trees=False)


def _nodes(function: Callable, tree: Any, *rest: Any, of_trees: bool = True) -> Any:
    """`function` of every tree as what trains, or of everything else, and of its counterparts in `rest`."""
    is_tree = lambda node: isinstance(node, dict)  # noqa: E731
    one = lambda node, *others: function(node, *others) if is_tree(node) is of_trees else node  # noqa: E731
    return jax.tree.map(one, tree, *rest, is_leaf=is_tree)


def _pieces(params: Tree, homes: Tree) -> Iterator[tuple[set[int], int]]:
    """Leaves that are moved together, by number, and their layers; 0: the arrays are moved whole.

    A stack whose layers are split over a pipeline's stages goes array by array: each device has other layers.
    """
    stacks: dict[tuple, tuple[set[int], int]] = {}
    places = jax.tree_util.tree_leaves_with_path(params)
    for number, ((path, array), home) in enumerate(zip(places, jax.tree.leaves(homes), strict=True)):
        together = path[0].key == "stacks" and home.shard_shape(array.shape)[0] == array.shape[0]
        name = (path[1].key,) if together else path
        stacks.setdefault(name, (set(), array.shape[0] if together else 0))[0].add(number)
    yield from stacks.values()


def _part(whole: Any, members: set[int], tree: Tree | None) -> Tree | None:
    if tree is None:
        return None
    parts = enumerate(whole.flatten_up_to(tree))
    return whole.unflatten([part if number in members else None for number, part in parts])


def _joined(whole: Any, members: set[int], made: Tree, tree: Tree) -> Tree:
    pairs = enumerate(zip(whole.flatten_up_to(made), whole.flatten_up_to(tree), strict=True))
    return whole.unflatten([new if number in members else old for number, (new, old) in pairs])


def _cut(index: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index, 1)


def _put(index: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new, index, 0)
