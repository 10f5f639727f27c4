"""Adam's moments in 8 bits, as bitsandbytes stores them: a code for each number, a float32 scale for each block.

Dettmers et al. 2022, arXiv 2110.02861. Not the weights' quantisation. Codes have their weight's own shape, and so its
sharding. Blocks of 256 lie along the last dimension: where 256 divides it they are bitsandbytes' own, which runs
through the flattened weight; elsewhere the last block of each row is shorter, as are a narrow adapter's.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.models.weights import Path, Tree, names_of

BLOCK = 256  # bitsandbytes' block of an optimiser's state
Shapes = Mapping[Path, Sequence[tuple[int, ...]]]  # of an array's layers, each without the zeros that fill it up
STACKS = "stacks"  # the key above arrays that have the layers along dimension 0
SLICES = 128  # at most
LARGE = 1 << 20  # numbers of a weight that is moved on slice by slice: its moments are never whole in float32
TINY = np.finfo(np.float32).tiny  # a block's largest is taken for no less: one over it is finite
SMALLEST = 4096  # numbers in a layer's weight below which its moments stay float32: bitsandbytes' min_8bit_size


class Moment(NamedTuple):
    """A moment: codes uint8 [..., n] and, for each block of the last dimension, absmax float32 [..., ceil(n / 256)]."""

    codes: jax.Array
    absmax: jax.Array


class Map(NamedTuple):
    """The numbers that the codes stand for, and how to find the code that is nearest to a number.

    codes: [256], rising. bounds: [256], the last number that still belongs to each code; inf at the end.
    first: [65536], the code of the lowest number whose float32 begins with these 16 bits. No two bounds lie between
    such numbers, so one comparison with a bound tells the code.
    """

    codes: np.ndarray
    bounds: np.ndarray
    first: np.ndarray


@functools.cache
def dynamic_map(signed: bool) -> Map:
    """bitsandbytes' dynamic 8-bit type: signed for the first moment, unsigned for the second."""
    return make_map(dynamic_codes(signed))


def dynamic_codes(signed: bool) -> np.ndarray:
    """0, 1, and the middles of 2^i (unsigned: 2^(i+1)) equal parts of [0.1, 1] times 10^(i-6), for i from 0 to 6.

    Equal to bitsandbytes.functional.create_dynamic_map in every bit, hence the order of the roundings.
    """
    values = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        step = float(np.float32(0.9) / np.float32(count))
        index = np.arange(count + 1)
        rising, falling = float(np.float32(0.1)) + step * index, 1.0 - step * (count - index)
        edges = np.where(index < (count + 1) // 2, rising, falling).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [*middles, *-middles] if signed else [*middles]
    return np.sort(np.array(values, np.float32))


def make_map(codes: np.ndarray) -> Map:
    """The tables for 256 rising codes. A number halfway between two codes has the lower one.

    Halfway as float32 tells it, as in bitsandbytes' PyTorch code and CUDA kernels since 0.50.
    """
    bounds = (codes[:-1] + codes[1:]) / np.float32(2)
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    ends = np.nan_to_num(np.stack([bits.view(np.float32), (bits | 0xFFFF).view(np.float32)]))
    first = np.searchsorted(bounds, ends.min(axis=0))
    return Map(codes, np.append(bounds, np.float32(np.inf)), first.astype(np.uint8))


def quantize(x: jax.Array, table: Map, shares: tuple[int, ...] = ()) -> Moment:
    """The nearest codes of float32 numbers [..., n], each times one over the largest size in its block.

    shares: into how many parts a row may be split over devices; they change no number.
    """
    pieces = _pieces(x, shares)
    absmax = _block_max(jnp.max(jnp.abs(pieces), axis=-1), pieces.shape[-1])
    scale = _spread(1 / jnp.maximum(absmax, TINY), pieces)
    return Moment(_nearest(pieces * scale, table).reshape(x.shape), absmax)


def dequantize(moment: Moment, table: Map, shares: tuple[int, ...] = ()) -> jax.Array:
    """The numbers that a moment stands for: float32 [..., n]. shares: as in `quantize`."""
    pieces = _pieces(moment.codes, shares)
    numbers = jnp.asarray(table.codes)[pieces] * _spread(moment.absmax, pieces)
    return numbers.reshape(moment.codes.shape)


def zeros(shape: tuple[int, ...], table: Map) -> Moment:
    """A moment of exact zeros."""
    zero = int(np.abs(table.codes).argmin())
    return Moment(jnp.full(shape, zero, jnp.uint8), jnp.zeros((*shape[:-1], -(-shape[-1] // BLOCK)), jnp.float32))


def _nearest(x: jax.Array, table: Map) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16
    code = jnp.asarray(table.first)[bits]
    return code + (x > jnp.asarray(table.bounds)[code]).astype(jnp.uint8)


def _pieces(x: jax.Array, shares: tuple[int, ...]) -> jax.Array:
    """[..., n] -> [..., n / d, d] for the largest d that divides blocks, rows, and each device's share of a row.

    A device then knows its pieces' maxima without the others' numbers; only those few travel.
    """
    size = x.shape[-1]
    piece = math.gcd(BLOCK, size, *(size // parts for parts in shares if size % parts == 0))
    return x.reshape(*x.shape[:-1], size // piece, piece)


def _block_max(maxima: jax.Array, piece: int) -> jax.Array:
    """The pieces' maxima [..., n / d] -> the blocks'."""
    per_block = BLOCK // piece
    padding = [(0, 0)] * (maxima.ndim - 1) + [(0, -maxima.shape[-1] % per_block)]
    return jnp.max(jnp.pad(maxima, padding).reshape(*maxima.shape[:-1], -1, per_block), axis=-1)


def _spread(absmax: jax.Array, pieces: jax.Array) -> jax.Array:
    """Each piece's block's number: [..., n / d, 1]."""
    return jnp.repeat(absmax, BLOCK // pieces.shape[-1], axis=-1)[..., : pieces.shape[-2], None]


def scale_by_adam_8bit(
    beta1: float, beta2: float, eps: float, sizes: Mapping[str, int] | None = None, shapes: Shapes | None = None
) -> optax.GradientTransformation:
    """Adam's direction from moments that are read, moved on in float32 and quantised again.

    The direction is that of the moments before they are rounded, as in bitsandbytes. Weights of fewer than 4096
    numbers (of a stack: in one layer) keep float32 moments. Gradients are float32. sizes: of the mesh's axes. shapes:
    of arrays that are larger in some layers than in others.
    """
    first, second = dynamic_map(True), dynamic_map(False)
    sizes = dict(sizes or {})
    shares = tuple(sizes.values())

    def init(params: Tree) -> optax.ScaleByAdamState:
        def moments(table: Map) -> Tree:
            return jax.tree_util.tree_map_with_path(
                lambda path, array: _initial(path, array, table, shapes or {}), params
            )

        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), moments(first), moments(second))

    def read(moment: Any, table: Map) -> jax.Array:
        return dequantize(moment, table, shares) if isinstance(moment, Moment) else moment

    def written(numbers: jax.Array, before: Any, table: Map) -> Any:
        return quantize(numbers, table, shares) if isinstance(before, Moment) else numbers

    def update(grads: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, optax.ScaleByAdamState]:
        count = state.count + 1
        mu_rest, nu_rest = (-jnp.expm1(count * math.log(beta)) if beta else 1.0 for beta in (beta1, beta2))

        def move(grad: jax.Array, mu: Any, nu: Any) -> tuple[jax.Array, Any, Any]:
            m = beta1 * read(mu, first) + (1 - beta1) * grad
            v = beta2 * read(nu, second) + (1 - beta2) * jnp.square(grad)
            direction = (m / mu_rest) / (jnp.sqrt(v / nu_rest) + eps)
            return direction, written(m, mu, first), written(v, nu, second)

        leaves, tree = jax.tree_util.tree_flatten_with_path(grads)
        each = zip(leaves, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu))
        moved = [_in_slices(move, _shares(path, grad, sizes), grad, *moments) for (path, grad), *moments in each]
        direction, mu, nu = (tree.unflatten(part) for part in (zip(*moved) if moved else ((), (), ())))
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _initial(path: tuple, array: jax.Array, table: Map, shapes: Shapes) -> Any:
    layers = array.shape[0] if path[0].key == STACKS else 1
    sizes = [math.prod(shape) for shape in shapes.get(names_of(path), ())]
    narrow = min(filter(None, sizes), default=array.size // layers) >= SMALLEST
    return zeros(array.shape, table) if narrow else jnp.zeros(array.shape, jnp.float32)


def _shares(path: tuple, array: jax.Array, sizes: dict[str, int]) -> int:
    """A number that the device shares along dimension 0 divide: layers are split over the pipeline's stages alone."""
    most = sizes.get("pipe", 1) if path[0].key == STACKS else math.prod(sizes.values())
    return math.gcd(array.shape[0], most) if array.ndim else 1


def _in_slices(function: Callable, shares: int, *trees: Any) -> Any:
    """`function` of arrays that agree in dimension 0, of which it treats each index alike, a slice at a time.

    Each result has the shape of the argument in its place. A slice has its part of each of the `shares` of
    dimension 0, so that no device waits for another's.
    """
    shape = jax.tree.leaves(trees)[0].shape
    if math.prod(shape) < LARGE or len(shape) < 2:
        return function(*trees)
    each = shape[0] // shares
    count = max(n for n in range(1, SLICES + 1) if each % n == 0)

    def body(index: jax.Array, trees: Any) -> Any:
        cut = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False), trees)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=1)
        return jax.tree.map(put, trees, function(*cut))

    sliced = jax.tree.map(lambda x: x.reshape(shares, count, each // count, *x.shape[1:]), trees)
    done = jax.lax.fori_loop(0, count, body, sliced)
    return jax.tree.map(lambda x, old: x.reshape(old.shape), done, trees)
