"""Attention over a split sequence beside attention over the whole of it."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxtune.models.attention import attention
from jaxtune.parallel.zigzag import AXIS, unzigzag, zigzag
from jaxtune.segments import SHARED

B, T, H, K, D = 2, 80, 8, 2, 8
SPLIT = P(None, AXIS)
# Segments that cross the borders of the chunks, of 20, 10 or 5 steps, and padding at the end.
PACKED = np.stack([np.repeat([1, 2, 3, 4, 0], [33, 2, 28, 9, 8]), np.repeat([1, 2, 3], [7, 60, 13])])
# The same with a start that all share, longer than a chunk in one row.
SHARING = np.stack([np.where(np.arange(T) < start, SHARED, row) for row, start in zip(PACKED, (25, 6))])


def draw(time=T, heads=H, kv_heads=K, dtype=jnp.float32, seed=0):
    """Random queries, keys, values, and the gradient of the output."""
    shapes = [(B, time, n, D) for n in (heads, kv_heads, kv_heads, heads)]
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def on_parts(function, parts: int, in_specs=SPLIT, out_specs=SPLIT):
    """A function of a device's own parts, as a compiled one of whole arrays in zigzag order."""
    mesh = jax.make_mesh((parts,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:parts])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def with_gradients(attend, q, k, v, dout, *args):
    """The output, and the gradients of this device's share of a loss whose gradient of the output is dout."""

    def loss(q, k, v):
        out = attend(q, k, v, *args)
        return jnp.sum((out * dout).astype(jnp.float32)), out

    grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


@cache
def compiled(attend, parts: int, traced_window: bool):
    """Output and gradients of a device's own (q, k, v, dout, segments) and, if traced, the window."""
    return on_parts(partial(with_gradients, attend), parts, (SPLIT,) * 5 + (P(),) * traced_window)


def split(attend, parts: int, q, k, v, dout, segments, *window):
    """Output, dq, dk, dv over a split sequence; arguments and results in natural order."""
    order, back = zigzag(q.shape[1], parts), unzigzag(q.shape[1], parts)
    arrays = (jnp.asarray(x)[:, order] for x in (q, k, v, dout, segments))
    return [x[:, back] for x in compiled(attend, parts, len(window) > 0)(*arrays, *window)]


@jax.jit
def whole(q, k, v, dout, segments, window=None):
    """The same on one device."""
    return with_gradients(lambda q, k, v: attention(q, k, v, segments, segments, window=window), q, k, v, dout)


def assert_same(ours, theirs, tolerance=1e-5):
    for name, mine, other in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        mine, other = np.asarray(mine, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(mine, other, atol=tolerance, rtol=tolerance, err_msg=name)


def random_segments(generator: np.random.Generator, time=T) -> np.ndarray:
    """[B, time]: packed documents of random lengths, and often padding."""
    rows = []
    for _ in range(B):
        borders = np.sort(generator.integers(0, time + 1, generator.integers(0, 12)))
        row = 1 + np.searchsorted(borders, np.arange(time), side="right")
        row[time - generator.integers(0, time // 2) :] = 0
        rows.append(row)
    return np.stack(rows).astype(np.int32)
