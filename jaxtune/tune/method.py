"""What a tuning method is, and what all of them share. A method is a file beside this one and a row in `METHODS`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Sharding

from jaxtune.config import TuneSection
from jaxtune.models.weights import Path, Tree, Weight, leaves_with_path

ShardingOf = Callable[[tuple[int, ...], tuple[str | None, ...]], Sharding]  # (shape, logical axes) -> sharding

EMBEDDING = ("embed", "weight")
HEAD = ("head", "weight")


@dataclass(frozen=True)
class Method:
    """A transform of the parameter tree, and what it says about itself before there are parameters.

    trained: (section, declarations) -> Hugging Face keys of the weights whose own values train.
    adapted: likewise, of the weights that stay as they are and carry something that trains.
    wrap: (section, params, declarations, seed, sharding_of) -> params with the method's typed leaves.
    separates: a head tied to the embedding becomes a weight of its own where either is trained or adapted.
    """

    trained: Callable[[TuneSection, Tree], set[str]]
    adapted: Callable[[TuneSection, Tree], set[str]] = lambda section, weights: set()
    wrap: Callable[[TuneSection, Tree, Tree, int, ShardingOf | None], Tree] = lambda section, params, *rest: params
    separates: bool = False


def declared(weights: Tree) -> Iterator[tuple[Path, Weight]]:
    """Every declaration with its path."""
    return leaves_with_path(weights)


def all_keys(weights: Tree) -> list[str]:
    """Every Hugging Face key, in the declarations' order."""
    return [key for _, weight in declared(weights) for key in weight.keys]


def get_path(tree: Tree, path: Path) -> Any:
    """What lies at `path`; None where nothing does."""
    for part in path:
        if part not in tree:
            return None
        tree = tree[part]
    return tree


def is_abstract(params: Tree) -> bool:
    """Whether the tree holds shapes in place of arrays."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))


def is_concrete(params: Tree) -> bool:
    """Whether the arrays have values: neither shapes nor traced."""
    return not is_abstract(params) and not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params))


def make(function: Callable, shardings: Any, abstract: bool, *arrays: Any, **settings: Any) -> Any:
    """The tree that `function` makes of arrays and static settings, each array in its own shards.

    Where `abstract`, the shapes alone. Calls with one function, settings and shapes are compiled once.
    """
    if not abstract:
        where = {} if shardings is None else {"out_shardings": shardings}
        return jax.jit(function, static_argnames=tuple(settings), **where)(*arrays, **settings)
    shapes = jax.eval_shape(partial(function, **settings), *arrays)
    if shardings is None:
        return shapes
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
