"""What every quantised weight is: a leaf that gives its numbers back for a matmul, forward and again backward.

The dequantised weight lives for one matmul. It is never among what a layer keeps for its backward pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import cpu_bfloat16
from jaxtune.errors import MeshError
from jaxtune.leaves import Axes, Axis, Leaf, fields_of, map_parts
from jaxtune.mesh import shards_of
from jaxtune.models.weights import Weight


class Quantized(Leaf):
    """A frozen linear map [out, in] in fewer bits. Axis 0 of every part is the layer.

    A subclass is a frozen dataclass that is registered as a pytree and gives `weight` and `axes`. All its parts are
    EXACT and none trains. Parts that cannot be split along `in` can lie along their rows (`row_axis`).
    """

    def weight(self, dtype: Any) -> jax.Array:
        """What this device has of one layer's weight: [out, in] in `dtype`, rounded once from float32."""
        raise NotImplementedError

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        (x,) = inputs
        return multiplied(x, self)

    def dense(self, is_table: bool) -> Any:
        return jax.lax.map(lambda layer: layer.weight(jnp.float32), self)

    def num_numbers(self) -> int:
        if not parts_of(self):
            return 0
        shapes = jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype), self)  # wherever they lie
        return jax.eval_shape(lambda leaf: leaf.dense(False), shapes).size


def row_axis(out_axis: Axis, in_axis: Axis) -> Axis:
    """The axis of the rows of a part that is not split along `in`: it lies along fsdp where the weight's `in` would.

    Along the tensor axis it is split where the weight's `out` is, else whole.
    """
    return (out_axis, in_axis) if in_axis == "embed" else out_axis  # type: ignore[return-value]


@jax.custom_vjp
def multiplied(x: jax.Array, leaf: Quantized) -> jax.Array:
    """x W^T, [..., in] -> [..., out] in x's type. It has a gradient in x alone, and keeps the leaf for it."""
    return cpu_bfloat16.contract(x, leaf.weight(x.dtype), (x.ndim - 1, 1))


def _multiplied_fwd(x, leaf):
    return multiplied(x, leaf), leaf


def _multiplied_bwd(leaf, d):
    # The barrier ties this dequantisation to the gradient's arrival: without it XLA would share the forward pass's,
    # and hold every weight of a layer from its recomputation on.
    leaf, d = jax.lax.optimization_barrier((leaf, d))
    return cpu_bfloat16.contract(d, leaf.weight(d.dtype), (d.ndim - 1, 0)), None


multiplied.defvjp(_multiplied_fwd, _multiplied_bwd)

ShardingOf = Callable[[tuple[int, ...], Axes], Any]  # (shape, logical axes) -> sharding


def parts_of(leaf: Quantized) -> dict[str, Any]:
    """The parts that a leaf has, by name."""
    return {name: getattr(leaf, name) for name in fields_of(leaf) if getattr(leaf, name) is not None}


def homes(leaf: Quantized, weight: Weight, sharding_of: ShardingOf) -> dict[str, Any]:
    """The sharding of every part.

    Raises:
        MeshError: an axis of the mesh does not divide a part.
    """
    axes = leaf.axes(weight.full_axes, weight.is_table)
    return {name: _home(weight, name, part, axes[name], sharding_of) for name, part in parts_of(leaf).items()}


def _home(weight: Weight, name: str, part: Any, axes: Axes, sharding_of: ShardingOf) -> Any:
    home = sharding_of(part.shape, axes)
    check_split(weight.key, name, part.shape, home.spec, home.mesh.shape)
    return home


def check_split(key: str, name: str, shape: tuple[int, ...], partition: Any, sizes: Mapping[str, int]) -> None:
    """Refuse what cannot be shared out equally.

    Raises:
        MeshError: with the numbers.
    """
    for size, shards in zip(shape, shards_of(partition, sizes, len(shape)), strict=True):
        if size % shards:
            axes = ", ".join(f"{axis} {count}" for axis, count in sizes.items() if count > 1)
            whose = key.replace("{layer}", "*")
            raise MeshError(
                f"mesh {{{axes}}}: the quantised {name} of {whose} are {list(shape)}, and {size} cannot be shared out "
                f"among {shards} devices (two numbers of a row are one byte in 4 bits); take smaller axes or int8"
            )


def placed(leaf: Leaf, weight: Weight, sharding_of: ShardingOf) -> Leaf:
    """A leaf of shapes with their shardings: a quantised one, or a tuning method's over one."""
    if not isinstance(leaf, Quantized):
        bare: Any = replace(leaf, base=None)  # type: ignore[type-var]
        over = map_parts(partial(_placed, sharding_of), bare, weight.full_axes, weight.is_table)
        return replace(over, base=placed(leaf.base, weight, sharding_of))  # type: ignore[attr-defined]
    where, shapes = homes(leaf, weight, sharding_of), parts_of(leaf).items()
    parts = {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where[name]) for name, s in shapes}
    return replace(leaf, **parts)  # type: ignore[type-var]


def _placed(sharding_of: ShardingOf, part: Any, axes: Axes, exact: bool) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding_of(part.shape, axes))
