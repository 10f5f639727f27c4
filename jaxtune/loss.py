"""Cross-entropy over supervised tokens only, in chunks, with its gradient taken in the forward pass.

The logits of a whole batch never exist: a loop goes over chunks of supervised tokens, as many as there are,
and each chunk's logits give its loss and its gradients at once. Nothing is computed again in the backward
pass, and a frozen head has no weight gradient.

Legend: P parts of the batch (one per device share), N tokens of a part, E hidden size, C chunk, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import ops
from jaxtune.leaves import LowRank
from jaxtune.mesh import constrain

CHUNK = 128  # tokens that each device share puts through the head at once


def cross_entropy(
    hidden_BTE: jax.Array,
    head: Any,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    parts: int = 1,
    key: jax.Array | None = None,
) -> jax.Array:
    """Sum over tokens of weight * -log softmax(hidden W^T)[target]: a float32 scalar.

    head: the leaf [vocab, E]. Tokens of weight 0 cost nothing. parts: over how many device shares the rows of
    the batch are spread; each share's tokens are chosen on its own device. key: of the dropout before a
    low-rank head; None turns it off.
    """
    drops = isinstance(head, LowRank) and key is not None and head.dropout > 0
    inputs = (hidden_BTE, ops.dropout(hidden_BTE, head.dropout, key)) if drops else (hidden_BTE,)
    hidden = tuple(constrain(x.reshape(parts, -1, x.shape[-1]), "batch", None, None) for x in inputs)
    targets_PN, weights_PN = (x.reshape(parts, -1) for x in (targets_BT, weights_BT.astype(jnp.float32)))
    return _cross_entropy(hidden, head, targets_PN, weights_PN)


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in float32: [..., V], [...] -> [...]. Works on a vocabulary that is split."""
    logits = logits.astype(jnp.float32)
    # A comparison in place of a gather: under tensor parallelism no device needs the others' logits.
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)


@jax.custom_vjp
def _cross_entropy(hidden, head, targets_PN, weights_PN):
    """hidden: ([P, N, E],), with dropout ([P, N, E], the same with numbers dropped)."""
    arrays, structure = jax.tree.flatten(head)

    def chunk(total, hidden, targets_PC, weights_PC):
        return total + _chunk_loss(hidden, arrays, structure, targets_PC, weights_PC), None

    return _sweep(chunk, jnp.float32(0), hidden, targets_PN, weights_PN)[0]


def _cross_entropy_fwd(hidden, head, targets, weights):
    """The loss, and as residuals the gradients themselves."""
    perturbed = [leaf.perturbed for leaf in jax.tree.leaves(head)]
    hidden, head, targets_PN, weights_PN = jax.tree.map(lambda leaf: leaf.value, (hidden, head, targets, weights))
    arrays, structure = jax.tree.flatten(head)
    trained = [array for array, train in zip(arrays, perturbed, strict=True) if train]

    def objective(hidden, trained, targets_PC, weights_PC):
        given = iter(trained)
        mixed = [next(given) if train else array for array, train in zip(arrays, perturbed, strict=True)]
        return _chunk_loss(hidden, mixed, structure, targets_PC, weights_PC)

    def chunk(carry, hidden, targets_PC, weights_PC):
        total, d_trained = carry
        grad = jax.value_and_grad(objective, argnums=(0, 1))
        loss, (d_hidden, d_arrays) = grad(hidden, trained, targets_PC, weights_PC)
        return (total + loss, [d + more.astype(d.dtype) for d, more in zip(d_trained, d_arrays, strict=True)]), d_hidden

    start = jnp.float32(0), [jnp.zeros(array.shape, jnp.float32) for array in trained]
    (loss, d_trained), d_hidden = _sweep(chunk, start, hidden, targets_PN, weights_PN)
    given = iter(d.astype(array.dtype) for d, array in zip(d_trained, trained, strict=True))
    d_head = [next(given) if train else None for train in perturbed]
    return loss, (d_hidden, jax.tree.unflatten(structure, d_head))


def _cross_entropy_bwd(residuals, g):
    d_hidden, d_head = jax.tree.map(lambda d: (d * g).astype(d.dtype), residuals)
    return d_hidden, d_head, None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd, symbolic_zeros=True)


def _chunk_loss(hidden, arrays, structure, targets_PC, weights_PC) -> jax.Array:
    head = jax.tree.unflatten(structure, arrays)
    if len(hidden) == 2:
        logits_PCV = ops.linear(hidden[0], head.base) + ops.low_rank(hidden[1], head)
    else:
        logits_PCV = ops.linear(hidden[0], head)
    logits_PCV = constrain(logits_PCV, "batch", None, "vocab")
    return jnp.sum(token_losses(logits_PCV, targets_PC) * weights_PC)


def _sweep(function, carry, hidden, targets_PN, weights_PN):
    """Fold `function(carry, hidden, targets, weights) -> (carry, d_hidden)` over the chunks that count.

    Returns the last carry and the d_hidden of all tokens, each [P, N, E], zero where nothing is supervised.
    """
    tokens = weights_PN.shape[1]
    size = min(CHUNK, tokens)
    order_PN = jnp.argsort(weights_PN == 0, axis=1, stable=True)  # supervised tokens first
    pad = lambda x_PN: jnp.pad(x_PN, ((0, 0), (0, -tokens % size)))  # noqa: E731
    targets, weights = (pad(jnp.take_along_axis(x, order_PN, axis=1)) for x in (targets_PN, weights_PN))
    order = pad(order_PN)

    def body(index, state):
        carry, d_sorted = state
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)  # noqa: E731
        chosen = tuple(jnp.take_along_axis(x_PNE, cut(order)[..., None], axis=1) for x_PNE in hidden)
        carry, d_hidden = function(carry, chosen, cut(targets), cut(weights))
        if d_hidden is not None:
            put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, index * size, axis=1)  # noqa: E731
            d_sorted = jax.tree.map(put, d_sorted, d_hidden)
        return carry, d_sorted

    chunks = -(-jnp.max(jnp.sum(weights_PN != 0, axis=1)) // size)
    d_sorted = tuple(jnp.zeros((*order.shape, x_PNE.shape[-1]), x_PNE.dtype) for x_PNE in hidden)
    carry, d_sorted = jax.lax.fori_loop(0, chunks, body, (carry, d_sorted))
    home = jnp.argsort(order_PN, axis=1)[..., None]
    return carry, tuple(jnp.take_along_axis(d_PNE, home, axis=1) for d_PNE in d_sorted)
