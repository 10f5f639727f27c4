"""What one device knows of the mesh inside the region in which a model runs, and how it speaks to the others.

A model runs inside one `jax.shard_map` that is manual over every axis: each array there is this device's own part.
Every device differentiates its own copy of everything, and its loss is its share of the sum over all devices.
Then the transpose of each collective is the one that jax gives it without replication checks (psum's is psum,
all_gather's is the sum's scattering), and the gradient of a weight is the sum over the axes along which it is copied.

Outside the region every axis has size 1 and every function here gives back what it was given.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune.errors import MeshError

ROWS = ("data", "fsdp")  # the axes that split the rows of a batch


def run(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`function` of local parts as a function of whole arrays."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def size(*axes: str) -> int:
    """How many parts these axes make together."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.manual_axes)


def index(axis: str) -> Any:
    """Which part along `axis` this device has."""
    return jax.lax.axis_index(axis) if size(axis) > 1 else 0


def total(tree: Any, *axes: str) -> Any:
    """The sum over the devices along these axes."""
    axes = _real(axes)
    return jax.lax.psum(tree, axes) if axes else tree


def largest(tree: Any, *axes: str) -> Any:
    """The maximum over the devices along these axes. It has no gradient."""
    axes = _real(axes)
    return jax.tree.map(lambda x: jax.lax.pmax(jax.lax.stop_gradient(x), axes), tree) if axes else tree


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """The parts of all devices along `axis`, one after another in dimension `dim`."""
    return jax.lax.all_gather(x, axis, axis=dim, tiled=True) if size(axis) > 1 else x


gathered.defvjp(
    lambda x, axis, dim: (gathered(x, axis, dim), None),
    lambda axis, dim, _, d: (scattered(d, axis, dim),),
)


def scattered(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """This device's part, in dimension `dim`, of the sum over the devices along `axis`."""
    if size(axis) == 1:
        return x
    if by_gloo():
        return _exchanged(x, axis, dim).sum(dim)
    return jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)


def by_gloo() -> bool:
    """Whether gloo moves what devices say to each other, as it does between CPUs wherever there may be other processes.

    Its reduce-scatter must not be used. A rank writes its result over what it may still be sending, and the first rank
    of a group then adds up the wrong numbers, in silence and more often on a busy machine (jax issue 40830; 1 step in
    300 of a small run). It also gives up after 30 seconds, whatever XLA's flags say (40831).
    """
    return jax.distributed.is_initialized() and jax.default_backend() == "cpu"


def check_sums(compiled: jax.stages.Compiled) -> None:
    """Refuse a program that would add up by gloo's reduce-scatter: one that XLA has made, for there is none here.

    Raises:
        MeshError: it would.
    """
    if by_gloo() and " reduce-scatter(" in compiled.as_text():
        raise MeshError(
            "XLA made a reduce-scatter of this step, and that of gloo, which moves data between CPU processes, gives "
            "wrong sums now and then; take another mesh, or one process"
        )


def _exchanged(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Every device's version of this device's part of `x`, along a new dimension `dim`."""
    parts = x.reshape(*x.shape[:dim], size(axis), x.shape[dim] // size(axis), *x.shape[dim + 1 :])
    return jax.lax.all_to_all(parts, axis, split_axis=dim, concat_axis=dim)


def part(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """This device's part, in dimension `dim`, of an array that all devices along `axis` have alike."""
    if size(axis) == 1:
        return x
    length = x.shape[dim] // size(axis)
    return jax.lax.dynamic_slice_in_dim(x, index(axis) * length, length, dim)


def when(active: Any, run: Callable, idle: Callable, *operands: Any) -> Any:
    """`run` or `idle` of the operands, as a flag says that may differ between devices.

    Only one of them is computed, but where the context axis is split: there keys go round by ppermute, in which every
    device of the mesh takes part whatever its flag, so both are computed and one is dropped.
    """
    if size("context") == 1:
        return jax.lax.cond(active, run, idle, *operands)
    return jax.tree.map(partial(jnp.where, active), run(*operands), idle(*operands))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def weight_gathered(x: jax.Array, axis: str, dim: int, dtype: Any, sum_dtype: Any) -> jax.Array:
    """`gathered`, moved as `dtype`; its gradient is summed up, and comes back, as `sum_dtype`."""
    return gathered(x.astype(dtype), axis, dim)


def _weight_gathered_fwd(x, axis, dim, dtype, sum_dtype):
    return weight_gathered(x, axis, dim, dtype, sum_dtype), jnp.zeros((0,), x.dtype)


def _weight_gathered_bwd(axis, dim, dtype, sum_dtype, like, d):
    return (scattered(d.astype(sum_dtype), axis, dim).astype(like.dtype),)


weight_gathered.defvjp(_weight_gathered_fwd, _weight_gathered_bwd)


def near(x: jax.Array) -> jax.Array:
    """An array from the host's memory in the device's; its gradient goes the other way."""
    return jax.device_put(x, jax.memory.Space.Device)


def _real(axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if size(axis) > 1)
