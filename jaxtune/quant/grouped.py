"""The leaf of weights in 2, 3, 4 or 8 bits by group, as GPTQ and AWQ store them, and the grid that they lie on.

Legend: O outputs, I inputs, G groups of a linear map.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.leaves import Axes, Leaf
from jaxtune.parallel import local
from jaxtune.quant.matmul import dequantised_matmul
from jaxtune.quant.packing import unpack


class Parts(NamedTuple):
    """What `Grid` dequantises: of one layer, or of what a device has of it."""

    codes: Any  # uint8 [O, I * bits / 8], the stream of bits of packing.py
    scales: Any  # [O, G]
    zeros: Any  # uint8 [O, G]
    groups: Any  # int32 [I], the group of each input; None: one after another


@dataclass(frozen=True)
class Grid:
    """W[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g]), g being the group of input i: in float32, then rounded."""

    bits: int
    group: int

    def __call__(self, parts: Parts, dtype: Any) -> jax.Array:
        codes = unpack(parts.codes, self.bits).astype(jnp.float32)
        scales, zeros = (self._spread(x.astype(jnp.float32), parts.groups, codes) for x in (parts.scales, parts.zeros))
        return (scales * (codes - zeros)).astype(dtype)

    def _spread(self, of_groups: jax.Array, groups: Any, codes: jax.Array) -> jax.Array:
        """[O, G] -> [O, I]."""
        if groups is not None:
            return jnp.take(of_groups, groups, axis=1)
        return jnp.repeat(of_groups, self.group, axis=1)[:, : codes.shape[1]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grouped(Leaf):
    """A frozen weight [out, in] on a grid of its own in each group of inputs. Axis 0 of each part is the layer.

    codes: uint8 [out, in * bits / 8]; scales: [out, groups]; zeros: uint8 [out, groups].
    groups: int32 [in], the group of each input, where they do not follow one another (GPTQ's act-order): no input
    moves, so that it may be split like the codes. spread: scales and zeros lie in parts along `in` as the codes do;
    otherwise they are whole along it, since an act-order knows no neighbourhood, and a device's part of the inputs
    need not be a number of whole groups.
    """

    EXACT: ClassVar[frozenset[str]] = frozenset({"codes", "scales", "zeros", "groups"})

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array
    groups: jax.Array | None = None
    grid: Grid = field(default=Grid(4, 128), metadata={"static": True})
    spread: bool = field(default=False, metadata={"static": True})

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        *layers, out_axis, in_axis = axes
        of_groups = (*layers, out_axis, in_axis if self.spread else None)
        return {"codes": axes, "scales": of_groups, "zeros": of_groups, "groups": (*layers, in_axis)}

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        (x,) = inputs
        return dequantised_matmul(x, self._here(split), self.grid)

    def dense(self, is_table: bool) -> Any:
        parts = Parts(self.codes, self.scales, self.zeros, self.groups)
        dequantise = lambda parts: self.grid(parts, jnp.float32)  # noqa: E731
        return jax.vmap(dequantise)(parts) if self.codes.ndim == 3 else dequantise(parts)

    def _here(self, split: str | None) -> Parts:
        """What this device computes with: of the scales that are whole along a split `in`, those of its inputs."""
        scales, zeros, groups = self.scales, self.zeros, self.groups
        inputs, size = self.codes.shape[1] * 8 // self.grid.bits, self.grid.group
        if groups is None and split and not self.spread and local.size(split) > 1:
            first = local.index(split) * inputs
            if inputs % size:
                groups = (first + jnp.arange(inputs)) // size
            else:
                scales, zeros = (
                    jax.lax.dynamic_slice_in_dim(x, first // size, inputs // size, axis=1) for x in (scales, zeros)
                )
        return Parts(self.codes, scales, zeros, groups)


class Fit(NamedTuple):
    """The grid of one group of each row."""

    scale: jax.Array  # [O], as the file has it
    zero: jax.Array  # [O], a whole number from 0 to 2^bits - 1


def fit(w_OI: jax.Array, bits: int, symmetric: bool, dtype: Any = jnp.float16) -> Fit:
    """The grid that reaches from a group's smallest to its largest number, 0 being on it (AutoGPTQ's Quantizer).

    symmetric: around 0, which then has the code 2^(bits - 1). dtype: of the scale, rounded before anything is coded
    with it. A zero is at least 1: the files' v1 stores it less 1, and not every reader wraps what falls below 0.
    """
    top = 2**bits - 1
    low, high = jnp.minimum(jnp.min(w_OI, axis=1), 0), jnp.maximum(jnp.max(w_OI, axis=1), 0)
    if symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    width = jnp.where(high > low, high - low, 2.0)
    scale = jnp.maximum((width / top).astype(dtype), jnp.finfo(dtype).tiny)
    exact = scale.astype(jnp.float32)
    zero = jnp.full_like(exact, (top + 1) // 2) if symmetric else jnp.clip(jnp.round(-low / exact), 1, top)
    return Fit(scale, zero)


def code(w: jax.Array, grid: Fit, bits: int) -> jax.Array:
    """The nearest codes of one input's weights [O], or of several's [O, n], as whole float32 numbers."""
    scale, zero = (x.astype(jnp.float32).reshape(-1, *[1] * (w.ndim - 1)) for x in grid)
    return jnp.clip(jnp.round(w / scale) + zero, 0, 2**bits - 1)


def value(codes: jax.Array, grid: Fit) -> jax.Array:
    """What codes stand for, in float32."""
    scale, zero = (x.astype(jnp.float32).reshape(-1, *[1] * (codes.ndim - 1)) for x in grid)
    return scale * (codes - zero)
