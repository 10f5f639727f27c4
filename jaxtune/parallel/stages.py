"""Which layers lie on which pipeline stage, and the way of a tree's arrays from layer order to stage order and back.

In layer order, as files and checkpoints have it, axis 0 of a stacked array is the layer's number. In stage order it
is S x V x n places, sharded over the pipe axis: stage by stage, chunk by chunk. Chunk c = v S + s of the model lies
on stage s. Where the layers do not divide evenly, places without a layer hold zeros and are passed over.

Legend: S stages, V chunks on each, n places of a chunk, L layers.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.errors import MeshError
from jaxtune.parallel import local

STACKS = "stacks"


@dataclass(frozen=True)
class Stages:
    """numbers: [S, V, n], the number of the layer at each place, or -1."""

    numbers: np.ndarray

    @classmethod
    def of(cls, layers: int, stages: int, virtual: int) -> "Stages":
        """Chunks of equal size; where that cannot be, the first ones have one layer more: the last has the head.

        Raises:
            MeshError: fewer layers than chunks.
        """
        chunks = stages * virtual
        if layers < chunks:
            what = f"mesh.pipe {stages}" + (f" x mesh.virtual_stages {virtual}" if virtual > 1 else "")
            raise MeshError(
                f"{what} makes {chunks} chunks of layers; the model has {layers} layers, and each needs one"
            )
        sizes = [layers // chunks + (chunk < layers % chunks) for chunk in range(chunks)]
        numbers: np.ndarray = np.full((stages, virtual, max(sizes)), -1, np.int32)
        for chunk, (size, stop) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
            numbers[chunk % stages, chunk // stages, :size] = np.arange(stop - size, stop)
        return cls(numbers)

    @property
    def is_even(self) -> bool:
        """Whether every place has a layer."""
        return bool((self.numbers >= 0).all())

    def staged(self, tree: Any) -> Any:
        """Arrays in layer order -> in stage order. Runs under jit; others than stacked ones stay as they are."""
        order = self.numbers.reshape(-1)
        places = np.where(order < 0, self.numbers.max() + 1, order)  # past the end: filled with zeros
        return _of_stacks(lambda x: jnp.take(local.near(x), places, axis=0, mode="fill", fill_value=0), tree)

    def brought(self, tree: Any, homes: Any) -> Any:
        """`staged`, outside jit, array by array: each is given up when its like is there, so few are held twice."""

        def bring(x: jax.Array, home: NamedSharding) -> jax.Array:
            made = jax.jit(lambda x: self.staged({STACKS: x})[STACKS], out_shardings=home)(x)
            jax.block_until_ready(made)
            x.delete()
            return made

        leaves, structure = jax.tree.flatten(tree)
        places = [is_stacked(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
        ways = [bring if stacked else jax.device_put for stacked in places]
        return structure.unflatten([go(x, home) for go, x, home in zip(ways, leaves, jax.tree.leaves(homes))])

    def unstaged(self, tree: Any) -> Any:
        """Arrays in stage order -> in layer order."""
        order = self.numbers.reshape(-1)
        places = np.argsort(np.where(order < 0, order.size, order), kind="stable")[: self.numbers.max() + 1]
        return _of_stacks(lambda x: jnp.take(local.near(x), places, axis=0), tree)

    def unstaged_homes(self, tree: Any) -> Any:
        """Shardings for what `unstaged` gives: split over pipe along another dimension, where one can be.

        tree: the arrays in stage order, or their shapes with shardings.
        """
        return _of_stacks(_moved, tree, lambda x: x.sharding)

    def unstaged_shape(self, tree: Any) -> Any:
        """The shapes and shardings of what `unstaged` gives."""
        shapes = jax.eval_shape(self.unstaged, tree)
        homes = self.unstaged_homes(tree)
        return jax.tree.map(lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), shapes, homes)


def _of_stacks(function: Any, tree: Any, other: Any = lambda x: x) -> Any:
    """`function` of every array on whose path a dict has the key "stacks", `other` of the rest."""

    return jax.tree_util.tree_map_with_path(lambda path, x: (function if is_stacked(path, x) else other)(x), tree)


def is_stacked(path: tuple, x: Any) -> bool:
    """Whether an array has the layers along axis 0: on its path a dict has the key "stacks"."""
    return x.ndim > 0 and any(getattr(part, "key", None) == STACKS for part in path)


def _moved(array: Any) -> NamedSharding:
    home: NamedSharding = array.sharding
    mesh: Mesh = home.mesh
    entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in home.spec]
    entries += [()] * (len(array.shape) - len(entries))
    entries[0] = ()
    for dim in range(1, len(entries)):
        axes = ("pipe", *entries[dim])
        if array.shape[dim] % int(np.prod([mesh.shape[axis] for axis in axes])) == 0:
            entries[dim] = axes
            break
    spec = PartitionSpec(*(axes or None for axes in entries))
    return NamedSharding(mesh, spec, memory_kind=home.memory_kind)
