"""Attention over a split sequence beside attention over the whole of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxtune.models.attention import attention
from jaxtune.parallel.zigzag import AXIS, unzigzag, zigzag

B, T, H, K, D = 2, 80, 8, 2, 8
SPLIT = P(None, AXIS)
# Segments that cross the borders of chunks, and padding at the end, with T = 80 and chunks of 5, 10 or 20 steps.
PACKED = np.stack(
    [np.repeat([1, 2, 3, 4, 0], [33, 2, 28, 9, 8]), np.repeat([1, 2, 3], [7, 60, 13])],
)


def draw(time=T, heads=H, kv_heads=K, dtype=jnp.float32, seed=0):
    """Random queries, keys, values, and the gradient of the output."""
    shapes = [(B, time, n, D) for n in (heads, kv_heads, kv_heads, heads)]
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def on_parts(function, parts: int, in_specs=SPLIT, out_specs=SPLIT):
    """A function of this device's parts as a compiled one of whole arrays in zigzag order."""
    mesh = jax.make_mesh((parts,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:parts])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def with_gradients(attend, q, k, v, dout, *args):
    """The output, and the gradients of this device's share of a loss whose gradient of the output is dout."""

    def loss(q, k, v):
        out = attend(q, k, v, *args)
        return jnp.sum((out * dout).astype(jnp.float32)), out

    grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


def split(attend, parts: int):
    """The output and gradients of `attend` of (q, k, v, dout, segments, window), all in natural order."""
    specs = (SPLIT,) * 5 + (P(),)
    run = on_parts(partial(with_gradients, attend), parts, specs)

    def natural(*args):
        *arrays, window = args
        order, back = zigzag(arrays[0].shape[1], parts), unzigzag(arrays[0].shape[1], parts)
        return [x[:, back] for x in run(*(x[:, order] for x in arrays), window)]

    return natural


@jax.jit
def whole(q, k, v, dout, segments, window):
    """The same of attention over the whole sequence on one device."""
    return with_gradients(lambda q, k, v: attention(q, k, v, segments, segments, window=window), q, k, v, dout)


def assert_same(ours, theirs, atol=1e-5):
    """Output, dq, dk, dv."""
    for name, mine, other in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        mine, other = np.asarray(mine, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(mine, other, atol=atol, rtol=atol, err_msg=name)
