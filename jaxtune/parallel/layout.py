"""Where each array of a training step lies, and how the gradients of all devices come together.

ZeRO's stages (Rajbhandari et al. 2020, arXiv 1910.02054) are levels of one table, mesh.ZERO: from its level on, a
kind of array lies in parts along the fsdp axis. What a device has of a gradient follows from where its weight lies:
a weight that is gathered has its gradient scattered back in the backward pass, by layer; one that is whole has it
scattered after each micro-batch (level 2), or summed at the end (below).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.errors import MeshError
from jaxtune.leaves import combine, map_parts
from jaxtune.mesh import BATCH, LARGE, rules_of, spec
from jaxtune.models.config import ModelConfig
from jaxtune.models.weights import Tree, map_tree
from jaxtune.parallel import local


def partitions(
    mesh: Mesh, config: ModelConfig, weights: Tree, params: Tree, *, zero: int = 3, kind: str = "params"
) -> Tree:
    """The partition of every array of a parameter tree, or of gradients or moments in its structure."""
    rules = rules_of(mesh, config, zero, kind)
    one = lambda array, axes, exact: spec(axes, rules)  # noqa: E731
    return map_tree(lambda w, leaf: map_parts(one, leaf, w.full_axes, w.is_table), weights, params)


@dataclass(frozen=True)
class Layout:
    """The partitions of a step's trees, each in its tree's structure."""

    mesh: Mesh
    trainable: Tree
    frozen: Tree
    grads: Tree  # as they leave the region, and as the optimiser takes them
    moments: Tree

    @classmethod
    def of(cls, mesh: Mesh, config: ModelConfig, weights: Tree, trainable: Tree, frozen: Tree, zero: int) -> "Layout":
        """weights: the declarations; trainable, frozen: arrays or their shapes, as leaves.partition gives them."""
        where = partial(partitions, mesh, config, weights, zero=zero)
        return cls(
            mesh, where(trainable), where(frozen), where(trainable, kind="grads"), where(trainable, kind="moments")
        )

    def homes(self, specs: Tree, memory_kind: str | None = None) -> Tree:
        """The shardings of partitions."""
        return jax.tree.map(lambda s: NamedSharding(self.mesh, s, memory_kind=memory_kind), specs)

    @property
    def split_grads(self) -> list[PartitionSpec]:
        """Of each gradient, in the order of the trainable tree's leaves."""
        return jax.tree.leaves(self.grads)

    def region(self, function: Callable, out_specs: Any) -> Callable:
        """`function(trained, frozen, batch, *scalars)` of a device's own parts, as a function of whole arrays.

        Inside, trained and frozen are the leaves of their trees; a list of results is a tree as trainable outside.
        """
        trained, structure = jax.tree.flatten(self.trainable)
        frozen = jax.tree.leaves(self.frozen)

        def call(trainable: Tree, rest: Tree, batch: dict[str, jax.Array], *scalars: jax.Array) -> Any:
            specs = trained, frozen, BATCH, *[PartitionSpec()] * len(scalars)
            inside = local.run(function, self.mesh, specs, out_specs)
            results = inside(jax.tree.leaves(trainable), jax.tree.leaves(rest), batch, *scalars)
            back = lambda result: structure.unflatten(result) if isinstance(result, list) else result  # noqa: E731
            return tuple(map(back, results)) if isinstance(results, tuple) else back(results)

        return call

    def params(self, trained: list[jax.Array], frozen: list[jax.Array]) -> Tree:
        """The whole parameter tree from the leaves of its two parts."""
        trees = zip((self.trainable, self.frozen), (trained, frozen), strict=True)
        return combine(*(jax.tree.structure(tree).unflatten(leaves) for tree, leaves in trees))

    def scattered(self, grads: list[jax.Array]) -> list[jax.Array]:
        """After a micro-batch, on the device: of a gradient that lies in parts though its weight is whole, one part.

        grads: in the order of the trainable tree's leaves.
        """
        homes = zip(grads, jax.tree.leaves(self.trainable), self.split_grads, strict=True)
        return [_scattered(local.near(grad), whole, split) for grad, whole, split in homes]

    def summed(self, grads: list[jax.Array]) -> list[jax.Array]:
        """After the last: the sum over every axis along which the gradient is still each device's own."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for place, split in enumerate(self.split_grads):
            copied = tuple(axis for axis in self.mesh.axis_names if axis not in _axes(split))
            groups.setdefault(copied, []).append(place)
        result = list(grads)
        for axes, places in groups.items():
            for place, array in zip(places, local.total([grads[place] for place in places], *axes), strict=True):
                result[place] = array
        return result

    def pinned(self, tree: Tree, part: Callable[[Tree], Tree] = lambda tree: tree) -> Tree:
        """A tree as trainable, split as the optimiser's moments are: each device updates what it has moments of.

        part: makes of a tree as trainable what `tree` is of it.
        """
        return jax.lax.with_sharding_constraint(tree, part(self.homes(self.moments)))


def _scattered(grad: jax.Array, whole: PartitionSpec, split: PartitionSpec) -> jax.Array:
    for dim, (before, after) in enumerate(zip(_padded(whole, grad.ndim), _padded(split, grad.ndim), strict=True)):
        for axis in set(after) - set(before):
            grad = local.scattered(grad, axis, dim)
    return grad


def _padded(partition: PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    """The axes of each dimension."""
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in partition]
    return entries + [()] * (ndim - len(entries))


def _axes(partition: PartitionSpec) -> set[str]:
    return {axis for entry in _padded(partition, len(partition)) for axis in entry}


def check_sharded(params: Tree, homes: Tree) -> None:
    """A large parameter that is whole on every device, though its home splits it, is an error."""

    def check(path: Any, array: Any, home: NamedSharding) -> None:
        whole = array.sharding.is_fully_replicated and not home.is_fully_replicated
        if whole and array.nbytes > LARGE:
            raise MeshError(f"{jax.tree_util.keystr(path)} {array.shape} is whole on each device, not {home.spec}")

    jax.tree_util.tree_map_with_path(check, params, homes)
