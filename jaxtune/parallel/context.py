"""Attention over a sequence that is split along the context axis: which way, by its name in the configuration."""

from collections.abc import Callable

import jax

from jaxtune.parallel.ring import ring_attention
from jaxtune.parallel.ulysses import ulysses_attention

KINDS: dict[str, Callable[..., jax.Array]] = {"ring": ring_attention, "ulysses": ulysses_attention}


def spread_attention(
    kind: str,
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    segments_BT: jax.Array,
    window: jax.Array | int | None = None,
    kernel: str = "xla",
) -> jax.Array:
    """`mesh.context_attention` of this device's parts, in zigzag order: [B, T, H, D].

    kernel: for Ulysses, which has whole sequences; the ring's tiles are its own.
    """
    own = {} if kind == "ring" else {"kernel": kernel}
    return KINDS[kind](q_BTHD, k_BTKD, v_BTKD, segments_BT, window, **own)
