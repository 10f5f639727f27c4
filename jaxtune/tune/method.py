"""What a tuning method is, and what all of them share. A method is a file beside this one and a row in `METHODS`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


def make(function: Callable[[], Any], shardings: Any, abstract: bool) -> Any:
    """The tree of arrays that `function` makes, each in its own shards; where `abstract`, their shapes alone."""
    if not abstract:
        return jax.jit(function)() if shardings is None else jax.jit(function, out_shardings=shardings)()
    shapes = jax.eval_shape(function)
    if shardings is None:
        return shapes
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
