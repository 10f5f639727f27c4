"""Which time steps a device of the context axis holds: one chunk from the front and its mirror from the back.

With C devices and 2C chunks, device i holds chunks i and 2C - 1 - i. Under a causal mask a late chunk sees much and an
early one little; the two together see the same on every device. A single device holds everything in its order.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import MeshError

AXIS = "context"  # the mesh axis along which a sequence is split


def zigzag(time: int, parts: int) -> np.ndarray:
    """int64 [time]: the step of the natural order that stands at each place; place by place, part after part.

    `x[..., zigzag(time, parts)]`, split into `parts` equal pieces, gives each device its own.

    Raises:
        MeshError: time is not divisible by 2 * parts.
    """
    check_length(time, parts)
    return np.asarray(into_zigzag(np.arange(time), parts, 0))


def unzigzag(time: int, parts: int) -> np.ndarray:
    """int64 [time], the inverse of `zigzag`: the place at which each step of the natural order stands."""
    check_length(time, parts)
    return np.asarray(out_of_zigzag(np.arange(time), parts, 0))


def check_length(time: int, parts: int) -> None:
    """Refuse a length that does not split into two equal chunks for each of `parts` devices."""
    chunks = 2 * parts
    if parts == 1 or time % chunks == 0:
        return
    below = time - time % chunks
    fits = f"{below} or {below + chunks}" if below else f"{chunks}"
    raise MeshError(
        f"data.max_length {time} is not divisible by 2 x mesh.context = {chunks}, for each of {parts} devices holds "
        f"two chunks of every sequence; {fits} would do"
    )


def positions_of(rank: jax.Array | int, time_local: int, parts: int) -> jax.Array:
    """int32 [time_local]: the steps of the whole sequence that device `rank` of `parts` holds, in its order."""
    steps = jnp.arange(time_local, dtype=jnp.int32)
    if parts == 1:
        return steps
    chunk = time_local // 2
    first, mirrored = rank * chunk, (2 * parts - 1 - rank) * chunk
    return steps + jnp.where(steps < chunk, first, mirrored - chunk).astype(jnp.int32)


def into_zigzag(x, parts: int, dim: int):
    """An array (numpy's or jax's) whose dimension `dim` is in natural order, in zigzag order."""
    if parts == 1:
        return x
    xp = np if isinstance(x, np.ndarray) else jnp
    chunks = x.reshape(*x.shape[:dim], 2, parts, -1, *x.shape[dim + 1 :])
    front, back = xp.split(chunks, 2, axis=dim)
    return xp.stack([front.squeeze(dim), xp.flip(back.squeeze(dim), dim)], axis=dim + 1).reshape(x.shape)


def out_of_zigzag(x, parts: int, dim: int):
    """An array (numpy's or jax's) whose dimension `dim` is in zigzag order, in natural order."""
    if parts == 1:
        return x
    xp = np if isinstance(x, np.ndarray) else jnp
    pairs = x.reshape(*x.shape[:dim], parts, 2, -1, *x.shape[dim + 1 :])
    front, back = xp.split(pairs, 2, axis=dim + 1)
    both = front.squeeze(dim + 1), xp.flip(back.squeeze(dim + 1), dim)
    return xp.concatenate(both, axis=dim).reshape(x.shape)
