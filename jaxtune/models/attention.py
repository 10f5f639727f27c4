"""Causal grouped-query attention over packed sequences: plain XLA, in blocks of queries.

Legend: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head size.
Attention knows order by index in the sequence and membership by segment id (jaxtune/segments.py); rotary positions are
not its business.
"""

import math

import jax
import jax.numpy as jnp

from jaxtune.segments import sees

MAX_BLOCKS = 8
MIN_BLOCK = 128
MASKED = -1e30  # not -inf: a row that sees nothing must give numbers, not nan


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    offset: jax.Array | int = 0,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v under the causal, segment and window mask: [B, T, H, D].

    q_segments [B, T], k_segments [B, S]: a query sees keys of its own segment, and what all segments share. offset:
    the first query's index among the keys; the number 0 with T == S skips the blocks that the causal mask hides.
    window: how many keys back a query sees, itself counted; None: all of them.
    """
    time = q_BTHD.shape[1]
    block = max(MIN_BLOCK, math.ceil(time / MAX_BLOCKS))
    triangular = isinstance(offset, int) and offset == 0 and time == k_BSKD.shape[1]
    if not triangular or time <= block:
        return _block(q_BTHD, k_BSKD, v_BSKD, q_segments, k_segments, offset, window)
    outputs = []
    for start in range(0, time, block):
        stop = min(start + block, time)
        inputs = q_BTHD[:, start:stop], k_BSKD[:, :stop], v_BSKD[:, :stop]
        outputs.append(_block(*inputs, q_segments[:, start:stop], k_segments[:, :stop], start, window))
    return jnp.concatenate(outputs, axis=1)


def visible(
    q_segments: jax.Array, k_segments: jax.Array, offset: jax.Array | int, window: jax.Array | int | None
) -> jax.Array:
    """The mask [B, T, S]: True where a query sees a key."""
    distance = offset + jnp.arange(q_segments.shape[1])[:, None] - jnp.arange(k_segments.shape[1])[None, :]
    return sees(q_segments[:, :, None], k_segments[:, None, :], distance, window)


def _block(q_BTHD, k_BSKD, v_BSKD, q_segments, k_segments, offset, window) -> jax.Array:
    batch, time, heads, dim = q_BTHD.shape
    kv_heads = k_BSKD.shape[2]
    # The queries that share a key head become rows of one matmul.
    q_BKGTD = q_BTHD.reshape(batch, time, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    q_BKGTD = q_BKGTD * (1.0 / math.sqrt(dim))
    scores = jnp.einsum("bkgtd,bskd->bkgts", q_BKGTD, k_BSKD, preferred_element_type=jnp.float32)
    mask = visible(q_segments, k_segments, offset, window)[:, None, None]
    probabilities = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1).astype(v_BSKD.dtype)
    out_BTKGD = jnp.einsum("bkgts,bskd->btkgd", probabilities, v_BSKD)
    return out_BTKGD.reshape(batch, time, heads, dim)
