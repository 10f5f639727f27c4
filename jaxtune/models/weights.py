"""A weight is declared once: shape, logical axes, initial value and Hugging Face key.

Modules hold a `Weight` where an array will stand; the tree of them drives loading, sharding,
initialisation and export. The layout is Hugging Face's own ([out, in] for a linear map), so there is
nothing to turn round between the two; the layers of a stack lie along a new axis 0.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.once import run_once

Tree = dict[str, Any]  # nested dicts of strings; the leaves are Weights, arrays, or leaves.py's types
Path = tuple[str, ...]

HOOKS = "hooks"  # of the tree, and of each stack: where a tuning method's own weights lie
TABLE = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Weight:
    """The declaration of one weight, or of the same weight in each layer of a stack."""

    shape: tuple[int, ...]  # of one layer
    axes: tuple[str | None, ...]  # logical axis of each dimension in `shape`; mesh.py maps them
    key: str  # Hugging Face key; "{layer}" stands for the layer's number
    init: str = "normal"  # normal | zeros | ones
    layers: range | None = None  # the layers along axis 0

    @property
    def full_shape(self) -> tuple[int, ...]:
        return self.shape if self.layers is None else (len(self.layers), *self.shape)

    @property
    def full_axes(self) -> tuple[str | None, ...]:
        return self.axes if self.layers is None else ("layers", *self.axes)

    @property
    def is_table(self) -> bool:
        """Whether its rows are looked up; other matrices are [out, in]."""
        return self.key == TABLE

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear map of the layers."""
        return self.layers is not None and len(self.shape) == 2

    @property
    def keys(self) -> list[str]:
        """The Hugging Face keys, in the order of axis 0."""
        return [self.key] if self.layers is None else [self.key.format(layer=i) for i in self.layers]

    def stacked(self, layers: range) -> "Weight":
        return replace(self, layers=layers)


def leaves_with_path(tree: Tree, prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf of nested dicts with its path, in the dicts' order; a typed leaf counts as one."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves_with_path(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def map_tree(function: Callable, tree: Tree, *rest: Tree | None) -> Tree:
    """`function` of each leaf of nested dicts and of its counterparts in `rest`, which may be None."""
    result = {}
    for name, value in tree.items():
        others = [None if other is None else other.get(name) for other in rest]
        is_dict = isinstance(value, dict)
        result[name] = map_tree(function, value, *others) if is_dict else function(value, *others)
    return result


def names_of(path: tuple) -> Path:
    """Of an array of a tree of weights, by its path as JAX has it: the dicts' keys and the typed leaves' fields."""
    return tuple(part.key if hasattr(part, "key") else part.name for part in path)


def set_path(tree: Tree, path: Path, value: Any) -> None:
    """Put `value` at `path`, making the dicts on the way."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def path_key(seed: int, path: Path | str) -> jax.Array:
    """A random key that depends on the seed and the path alone: any mesh and process count start alike."""
    return jax.random.fold_in(jax.random.key(seed), number_of(path if isinstance(path, str) else "/".join(path)))


def number_of(name: str) -> int:
    """What a name is to a random key."""
    return zlib.crc32(name.encode())


def _drawn(numbers: Any, weight: Weight, seed: int, std: float, dtype: Any) -> jax.Array:
    """The initial array of a weight trained from scratch. Each layer has the key of its own name.

    numbers: of the names, in the order of axis 0.
    """
    if weight.init != "normal":
        fill = {"zeros": jnp.zeros, "ones": jnp.ones}[weight.init]
        return fill(weight.full_shape, dtype)

    def draw(number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), number)
        return (std * jax.random.normal(key, weight.shape, jnp.float32)).astype(dtype)

    # One program for all layers: a draw for each takes as long to compile as the step.
    draws = jax.vmap(draw)(numbers)
    return draws[0] if weight.layers is None else draws


def _numbers(weight: Weight) -> np.ndarray:
    return np.array([number_of(key) for key in weight.keys], np.uint32)


def _nameless(weight: Weight) -> Weight:
    """Equal for weights that are alike but for their names, so that one program draws them all."""
    layers = None if weight.layers is None else range(len(weight.layers))
    return replace(weight, axes=(None,) * len(weight.axes), key="", layers=layers)


def init_params(
    weights: Tree,
    shardings: Tree,
    seed: int,
    std: float,
    dtype: Any,
    finish: Callable[[Weight, jax.Array], Any] = lambda weight, array: array,
    type_of: Callable[[Weight, Any], Any] = lambda weight, dtype: dtype,
) -> Tree:
    """Random parameters for training from scratch, each made in its own shards. finish: makes a leaf of each, which
    was drawn in the type that type_of says."""

    def make(weight: Weight, sharding) -> Any:
        settings = {"weight": _nameless(weight), "seed": seed, "std": std, "dtype": jnp.dtype(type_of(weight, dtype))}
        return finish(weight, run_once(_drawn, _numbers(weight), shardings=sharding, **settings))

    return map_tree(make, weights, shardings)
