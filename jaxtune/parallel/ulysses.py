"""Ulysses attention: two exchanges, between which each device has whole sequences of a share of the heads.

After Jacobs et al. 2023 (arXiv 2309.14509). To be called inside a shard_map that is manual over the context axis.

Legend: B batch, T tokens of this device, H query heads, K key/value heads, D head size.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune.errors import MeshError
from jaxtune.models.attention import attention
from jaxtune.models.kernels import attend
from jaxtune.models.tiled import SAVED
from jaxtune.parallel.zigzag import AXIS, into_zigzag, out_of_zigzag


def ulysses_attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    segments_BT: jax.Array,
    window: jax.Array | int | None = None,
    kernel: str = "xla",
) -> jax.Array:
    """What `jaxtune.models.attention` gives for the whole sequence, of this device's part: [B, T, H, D].

    All arguments are this device's parts, in zigzag order. window: how many keys back a query sees, itself counted;
    None: all of them. kernel: what attends between the exchanges, a name of models/kernels.py. KV heads that the axis
    does not divide are repeated until it does.

    Raises:
        MeshError: the axis does not divide the query heads.
    """
    parts = jax.lax.axis_size(AXIS)
    check_heads(q_BTHD.shape[2], parts)
    repeats = math.lcm(k_BTKD.shape[2], parts) // k_BTKD.shape[2]
    k_BTKD, v_BTKD = (jnp.repeat(x, repeats, axis=2) for x in (k_BTKD, v_BTKD))
    q, k, v = (_to_heads(x, parts) for x in (q_BTHD, k_BTKD, v_BTKD))
    segments = out_of_zigzag(jax.lax.all_gather(segments_BT, AXIS, axis=1, tiled=True), parts, 1)
    if kernel != "xla":  # it names itself what its backward pass needs, which is its output before the exchange
        return _to_time(attend(kernel, q, k, v, segments, window), parts)
    out = _to_time(attention(q, k, v, segments, segments, window=window), parts)
    return checkpoint_name(out, SAVED)


def check_heads(num_local_q_heads: int, parts: int) -> None:
    """Refuse query heads (of one device of the tensor axis) that cannot be shared equally among `parts` devices."""
    if num_local_q_heads % parts == 0:
        return
    fits = [n for n in range(1, num_local_q_heads + 1) if num_local_q_heads % n == 0]
    raise MeshError(
        f"mesh.context = {parts} does not divide the {num_local_q_heads} query heads of a device, which "
        f"mesh.context_attention: ulysses shares out; mesh.context may be {', '.join(map(str, fits))}, or take "
        "context_attention: ring, which knows no such limit"
    )


def _to_heads(x_BTHD: jax.Array, parts: int) -> jax.Array:
    """From all heads of a part of the sequence to a share of the heads of all of it, in natural order."""
    return out_of_zigzag(jax.lax.all_to_all(x_BTHD, AXIS, split_axis=2, concat_axis=1, tiled=True), parts, 1)


def _to_time(x_BTHD: jax.Array, parts: int) -> jax.Array:
    """The way back."""
    return jax.lax.all_to_all(into_zigzag(x_BTHD, parts, 1), AXIS, split_axis=1, concat_axis=2, tiled=True)
