"""The leaf of weights in 2, 3, 4 or 8 bits by group, as GPTQ and AWQ store them, and the grid that they lie on.

Legend: O outputs, I inputs, G groups of a linear map.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.leaves import Axes
from jaxtune.parallel import local
from jaxtune.quant.leaf import Quantized, row_axis
from jaxtune.quant.packing import unpack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grouped(Quantized):
    """W[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g]), g being the group of input i. Axis 0 of each part is the
    layer.

    codes: uint8 [out, in * bits / 8], the stream of bits of packing.py; scales: [out, groups]; zeros: uint8
    [out, groups]. groups: int32 [in], the group of each input, where they do not follow one another: GPTQ's act-order.
    No input moves for it, so that `in` may be split like any other: scales and zeros are whole along it, and each
    device takes those of its own inputs. group: how many inputs share a scale. inputs_in_all: of the
    whole weight, over all devices.
    """

    EXACT: ClassVar[frozenset[str]] = frozenset({"codes", "scales", "zeros", "groups"})

    codes: Any
    scales: Any
    zeros: Any
    groups: Any = None
    bits: int = field(default=4, metadata={"static": True})
    group: int = field(default=128, metadata={"static": True})
    inputs_in_all: int = field(default=0, metadata={"static": True})

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        *layers, out_axis, in_axis = axes
        of_groups = (*layers, row_axis(out_axis, in_axis), None)
        return {"codes": axes, "scales": of_groups, "zeros": of_groups, "groups": (*layers, in_axis)}

    def weight(self, dtype: Any) -> jax.Array:
        codes = unpack(self.codes, self.bits).astype(jnp.float32)
        scales, zeros = (self._spread(x.astype(jnp.float32), codes.shape[1]) for x in (self.scales, self.zeros))
        return (scales * (codes - zeros)).astype(dtype)

    def _spread(self, of_groups: jax.Array, inputs: int) -> jax.Array:
        """[O, G] -> [O, I] of this device's inputs."""
        if self.groups is not None:
            return jnp.take(of_groups, self.groups, axis=1)
        if inputs < self.inputs_in_all:
            first = local.index("tensor") * inputs
            if inputs % self.group:
                return jnp.take(of_groups, (first + jnp.arange(inputs)) // self.group, axis=1)
            of_groups = jax.lax.dynamic_slice_in_dim(of_groups, first // self.group, inputs // self.group, axis=1)
        return jnp.repeat(of_groups, self.group, axis=1)[:, :inputs]


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
