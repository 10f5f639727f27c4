"""Weights in 4 bits: NF4 and FP4, with a scale for each block of the flattened weight, as bitsandbytes has them; int4.

Dettmers et al. 2023, arXiv 2305.14314; the definition is bitsandbytes/backends/default/ops.py (0.50). Codes, scales
and their packing equal it in every bit. With double quantisation the scales are 8-bit codes of their difference from
their mean, in blocks of 256; the mean is rounded from the exact sum, where bitsandbytes' own depends on the device.
int4 is GPTQ's symmetric grid (arXiv 2210.17323 and its code): -8 to 7 times 2/15 of the largest size in a group.

Legend: O outputs, I inputs of the weight, B numbers of a block, N blocks, g numbers of a row's piece with one scale.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.eight_bit import dynamic_codes
from jaxtune.errors import ModelError
from jaxtune.leaves import Axes
from jaxtune.parallel import local
from jaxtune.quant.leaf import Quantized, row_axis

BLOCK = 64  # bitsandbytes' default
NESTED_BLOCK = 256
GROUP = 128  # of int4
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)  # in the order of the bits, times 12
CODES = {
    "nf4": np.array(_NF4, np.float32),
    "fp4": np.array(_FP4, np.float32) / np.float32(12),
    "int4": np.arange(-8, 8, dtype=np.float32),
}


class Blocks(NamedTuple):
    """A weight of one layer as bitsandbytes holds it. packed: uint8 [O I / 2], the first number in the upper bits;
    absmax: float32 [N], or uint8 with nested: float32 [ceil(N / 256)] and offset: float32 scalar."""

    packed: jax.Array
    absmax: jax.Array
    nested: jax.Array | None = None
    offset: jax.Array | None = None


def quantize(w: jax.Array, kind: str, double: bool, block: int = BLOCK) -> Blocks:
    """A weight [O, I] -> its blocks. kind: nf4 | fp4."""
    order, bounds = _steps(CODES[kind])
    index, absmax = _nearest(w.astype(jnp.float32).reshape(-1), bounds, block)
    codes = jnp.asarray(order)[index].reshape(-1, 2)
    packed = codes[:, 0] << 4 | codes[:, 1]
    return quantize_scales(Blocks(packed, absmax)) if double else Blocks(packed, absmax)


def quantize_int4(w: jax.Array) -> Blocks:
    """A weight [O, I] by the nearest numbers of the grid of its group: 128 numbers of a row, or what divides it."""
    group = piece_of(w.shape[1], GROUP)
    rows = w.astype(jnp.float32).reshape(-1, group)
    scales = jnp.max(jnp.abs(rows), axis=1) * np.float32(2 / 15)
    steps = jnp.round(rows / jnp.where(scales > 0, scales, 1.0)[:, None])
    codes = (jnp.clip(steps, -8, 7) + 8).astype(jnp.uint8).reshape(-1, 2)
    return Blocks(codes[:, 0] << 4 | codes[:, 1], scales)


def quantize_scales(blocks: Blocks, offset: jax.Array | None = None) -> Blocks:
    """Double quantisation. offset: in place of the scales' mean."""
    offset = exact_mean(blocks.absmax) if offset is None else offset
    order, bounds = _steps(dynamic_codes(signed=True))
    index, nested = _nearest(blocks.absmax - offset, bounds, NESTED_BLOCK)
    return blocks._replace(absmax=jnp.asarray(order)[index], nested=nested, offset=offset)


def _steps(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes' numbers in rising order of what they stand for, the numbers halfway between neighbours)."""
    order = np.argsort(codes, kind="stable")
    return order.astype(np.uint8), (codes[order[:-1]] + codes[order[1:]]) / np.float32(2)


def _nearest(x: jax.Array, bounds: np.ndarray, block: int) -> tuple[jax.Array, jax.Array]:
    """(the number of bounds below x / its block's absmax, each absmax) of float32 numbers [n].

    Whole blocks are multiplied by 1 / absmax, an incomplete last one is divided by absmax: that is what
    bitsandbytes does.
    """
    n, blocks = x.size, -(-x.size // block)
    rows = jnp.pad(x, (0, -n % block)).reshape(blocks, block)
    absmax = jnp.max(jnp.abs(rows), axis=1)
    divisor = jnp.where(absmax > jnp.finfo(jnp.float32).tiny, absmax, 1.0)[:, None]
    # The barrier keeps XLA from making one division of the two.
    scaled = rows * jax.lax.optimization_barrier(1.0 / divisor)
    if n % block:
        scaled = scaled.at[-1].set(rows[-1] / divisor[-1])
    scaled = jnp.clip(scaled, -1, 1).reshape(-1)[:n]
    if bounds.size > 32:
        return jnp.searchsorted(bounds, scaled), absmax
    return sum((scaled > bound).astype(jnp.uint8) for bound in bounds), absmax  # in one pass, with nothing beside it


def exact_mean(x: jax.Array) -> jax.Array:
    """The mean of float32 numbers >= 0, right to the last bit or the one beside it: sums with their errors."""
    high = jnp.pad(x, (0, (1 << max(x.size - 1, 0).bit_length()) - x.size))
    low = jnp.zeros_like(high)
    while high.size > 1:
        (a, b), (c, d) = jnp.split(high, 2), jnp.split(low, 2)
        total = a + b
        part = jax.lax.optimization_barrier(total - a)
        error = (a - jax.lax.optimization_barrier(total - part)) + (b - part)  # Knuth's two-sum
        high, low = total, error + (c + d)
    return (high[0] + low[0]) / x.size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FourBit(Quantized):
    """W in NF4, FP4 or int4. Axis 0 of each part is the layer.

    codes: uint8 [O, I / 2]; scales: float32, or uint8 codes of them, [O, I / g], where g is the largest number of
    which blocks and rows are multiples: a block that lies in several pieces has its scale in each of them. nested:
    float32 [ceil(N / 256)] and offset: scalar, with double quantisation. shape: [O, I] of the whole weight.
    """

    EXACT: ClassVar[frozenset[str]] = frozenset({"codes", "scales", "nested", "offset"})

    codes: Any
    scales: Any
    nested: Any = None
    offset: Any = None
    shape: tuple[int, ...] = field(kw_only=True, metadata={"static": True})
    kind: str = field(kw_only=True, metadata={"static": True})
    block: int = field(default=BLOCK, kw_only=True, metadata={"static": True})

    def axes(self, axes: Axes, is_table: bool) -> dict[str, Axes]:
        *layers, out_axis, in_axis = axes
        parts = {"codes": axes, "scales": (*layers, row_axis(out_axis, in_axis), None)}
        return {**parts, "nested": (*layers, None), "offset": tuple(layers)}

    def weight(self, dtype: Any) -> jax.Array:
        rows, columns = self.codes.shape[0], 2 * self.codes.shape[1]
        first = [_first(own, whole) for own, whole in zip((rows, columns), self.shape, strict=True)]
        piece = math.gcd(piece_of(self.shape[1], self.block), columns)
        scales = jnp.repeat(self._scales(first[0]), piece_of(self.shape[1], self.block) // piece, axis=1)
        scales = jax.lax.dynamic_slice_in_dim(scales, first[1] // piece, columns // piece, axis=1)
        numbers = unpacked(self.codes, self.kind).reshape(rows, columns // piece, piece)
        return (numbers * scales[..., None]).reshape(rows, columns).astype(dtype)

    def _scales(self, first_row: Any) -> jax.Array:
        """Float32 scales of this device's rows, which begin at `first_row`: [O, I / g]."""
        if self.nested is None:
            return self.scales
        rows, pieces = self.scales.shape
        piece = piece_of(self.shape[1], self.block)
        row, column = jnp.arange(rows)[:, None] + first_row, jnp.arange(pieces)
        block = (row * (self.shape[1] // piece) + column) // (self.block // piece)
        scales = jnp.asarray(dynamic_codes(signed=True))[self.scales] * self.nested[block // NESTED_BLOCK]
        # bitsandbytes rounds the product and the sum; the maximum, which changes nothing, keeps them from being fused.
        return jnp.maximum(scales, jnp.finfo(jnp.float32).min) + self.offset


def _first(own: int, whole: int) -> Any:
    """Where this device's part of a dimension begins: it has all of it, or its part along the tensor axis."""
    return 0 if own == whole else local.index("tensor") * own


def piece_of(columns: int, block: int) -> int:
    """How many numbers of a row of so many, one after another, always share a scale."""
    return math.gcd(columns, block)


def unpacked(codes: jax.Array, kind: str) -> jax.Array:
    """Numbers of packed codes: uint8 [..., n] -> float32 [..., 2 n]."""
    table = CODES[kind]
    pairs = np.stack([np.repeat(table, 16), np.tile(table, 16)], axis=-1)  # what each byte stands for
    return jnp.asarray(pairs)[codes].reshape(*codes.shape[:-1], -1)


def from_blocks(blocks: Blocks, shape: tuple[int, ...], kind: str, block: int = BLOCK) -> FourBit:
    """The leaf of one layer's blocks, without an axis of layers."""
    rows, columns = shape
    pieces = jnp.repeat(blocks.absmax, block // piece_of(columns, block))[: rows * columns // piece_of(columns, block)]
    packed, scales = blocks.packed.reshape(rows, -1), pieces.reshape(rows, -1)
    return FourBit(packed, scales, blocks.nested, blocks.offset, shape=shape, kind=kind, block=block)


def check_shape(shape: tuple[int, ...], key: str) -> None:
    """Two numbers share a byte, and must not lie in two rows.

    Raises:
        ModelError: the rows have an odd length.
    """
    if shape[1] % 2:
        raise ModelError(f"{key} has rows of {shape[1]} numbers; in 4 bits their number must be even; take int8")
