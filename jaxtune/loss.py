"""Cross-entropy over supervised tokens only, in chunks, with its gradient taken in the forward pass.

The logits of a whole batch never exist: a loop goes over chunks of supervised tokens, as many as there are,
and each chunk's logits give its loss and its gradients at once. Nothing is computed again in the backward
pass, and a frozen head has no weight gradient. Where the vocabulary is split over the tensor axis, each device
has the logits of its own part, and only sums and maxima over it move: one number for each token.

Legend: N tokens of this device, E hidden size, C chunk, V vocabulary of this device.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import ops
from jaxtune.ops import Noise
from jaxtune.parallel import local

# Tokens that a device puts through the head at once. From 256 on a CPU's products are nearly as fast as with more, and
# its logits stay small. An accelerator reads the whole head for each chunk, so it takes as many as the float32 logits
# allow, of which about three times the bytes are in use.
CHUNK = 256
PARTS = 8  # of a chunk: the last one is as few of them as its tokens fit into
CHUNK_ELSEWHERE = 2048
LOGITS = 512 << 20  # bytes; 800 tokens of 150,000 words, whose products take longer than reading the head
MEMORY = 24 << 30  # of a device, for each LOGITS: a head that trains adds up a gradient of its own size every chunk


def chunk_of(vocab_size: int) -> int:
    """Tokens of a chunk on this platform. vocab_size: of one device."""
    if jax.default_backend() == "cpu":
        return CHUNK
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    logits = LOGITS * max(1, memory // MEMORY)  # the same in all processes that have the same kind of device
    return max(CHUNK, min(CHUNK_ELSEWHERE, logits // (4 * vocab_size) // 128 * 128))


def cross_entropy(
    hidden_BTE: jax.Array,
    head: Any,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    noise: Noise | None = None,
) -> jax.Array:
    """This device's share of the sum over tokens of weight * -log softmax(hidden W^T)[target]: a float32 scalar.

    head: the leaf [vocab, E]. Tokens of weight 0 cost nothing. noise: of the dropout before a low-rank head; None
    turns it off. Devices along the tensor axis have the same tokens, and each has an equal share of their loss.
    """
    hidden = tuple(x.reshape(-1, x.shape[-1]) for x in ops.inputs(hidden_BTE, head, noise))
    targets, weights = jnp.asarray(targets_BT), jnp.asarray(weights_BT, jnp.float32)
    return _cross_entropy(hidden, head, targets.reshape(-1), weights.reshape(-1))


@jax.custom_vjp
def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in float32: [..., V], [...] -> [...], from this device's part of the logits.

    The gradient is written out, softmax less one at the target: what autodiff makes of picking the target's logit is a
    scatter into zeros, and of comparing every number with it one more pass over all logits.
    """
    return _token_losses_fwd(logits, targets)[0]


def _token_losses_fwd(logits, targets):
    wide, own = logits.astype(jnp.float32), targets - local.index("tensor") * logits.shape[-1]
    inside = (own >= 0) & (own < logits.shape[-1])
    picked = jnp.take_along_axis(wide, jnp.where(inside, own, 0)[..., None], axis=-1)[..., 0]
    top = local.largest(jnp.max(wide, axis=-1), "tensor")
    total = local.total(jnp.sum(jnp.exp(wide - top[..., None]), axis=-1), "tensor")
    at_target = local.total(jnp.where(inside, picked, 0.0), "tensor")
    return top + jnp.log(total) - at_target, (logits, own, top, total)


def _token_losses_bwd(residuals, g):
    logits, own, top, total = residuals
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == own[..., None]
    # Not exp(logits - log of the sum), which rounds with the size of the logits.
    difference = jnp.exp(logits.astype(jnp.float32) - top[..., None]) / total[..., None] - is_target
    return (difference * local.total(g, "tensor")[..., None]).astype(logits.dtype), None


token_losses.defvjp(_token_losses_fwd, _token_losses_bwd)


@jax.custom_vjp
def _cross_entropy(hidden, head, targets_N, weights_N):
    """hidden: what ops.inputs made of the hidden states: one [N, E], or two where a head has dropout."""
    arrays, structure = jax.tree.flatten(head)

    def chunk(hidden, targets_C, weights_C):
        return _chunk_loss(hidden, arrays, structure, targets_C, weights_C), None

    return _sweep(chunk, jnp.float32(0), hidden, targets_N, weights_N, _width(hidden, head))[0]


def _cross_entropy_fwd(hidden, head, targets, weights):
    """The loss, and as residuals the gradients themselves."""
    perturbed = [leaf.perturbed for leaf in jax.tree.leaves(head)]
    hidden, head, targets_N, weights_N = jax.tree.map(lambda leaf: leaf.value, (hidden, head, targets, weights))
    arrays, structure = jax.tree.flatten(head)
    trained = [array for array, train in zip(arrays, perturbed, strict=True) if train]

    def objective(hidden, trained, targets_C, weights_C):
        given = iter(trained)
        mixed = [next(given) if train else array for array, train in zip(arrays, perturbed, strict=True)]
        return _chunk_loss(hidden, mixed, structure, targets_C, weights_C)

    def chunk(hidden, targets_C, weights_C):
        grad = jax.value_and_grad(objective, argnums=(0, 1))
        loss, (d_hidden, d_arrays) = grad(hidden, trained, targets_C, weights_C)
        return (loss, d_arrays), d_hidden

    start = jnp.float32(0), [jnp.zeros(array.shape, jnp.float32) for array in trained]
    (loss, d_trained), d_hidden = _sweep(chunk, start, hidden, targets_N, weights_N, _width(hidden, head))
    given = iter(d.astype(array.dtype) for d, array in zip(d_trained, trained, strict=True))
    d_head = [next(given) if train else None for train in perturbed]
    return loss, (d_hidden, jax.tree.unflatten(structure, d_head))


def _cross_entropy_bwd(residuals, g):
    d_hidden, d_head = jax.tree.map(lambda d: (d * g).astype(d.dtype), residuals)
    return d_hidden, d_head, None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd, symbolic_zeros=True)


def _chunk_loss(hidden, arrays, structure, targets_C, weights_C) -> jax.Array:
    head = jax.tree.unflatten(structure, arrays)
    logits_CV = ops.product(hidden, head)
    return jnp.sum(token_losses(logits_CV, targets_C) * weights_C) / local.size("tensor")


def _width(hidden, head) -> int:
    """The vocabulary of this device."""
    return jax.eval_shape(ops.product, hidden, head).shape[-1]


def _sweep(function, total, hidden, targets_N, weights_N, vocab_size):
    """Add up `function(hidden, targets, weights) -> (what to add, d_hidden)` over the chunks that count.

    Returns the sum from `total` on and the d_hidden of all tokens, each [N, E], zero where nothing is supervised.
    """
    tokens = weights_N.shape[0]
    size = min(chunk_of(vocab_size), tokens)
    order_N = jnp.argsort(weights_N == 0, stable=True)  # supervised tokens first
    pad = lambda x_N: jnp.pad(x_N, (0, -tokens % size))  # noqa: E731
    targets, weights = pad(targets_N[order_N]), pad(weights_N[order_N])
    order, count = pad(order_N), jnp.sum(weights_N != 0)

    def body(index, state):
        total, d_sorted = state
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size)  # noqa: E731
        chosen = tuple(x_NE[cut(order)] for x_NE in hidden)
        more, d_hidden = _fitting(function, count - index * size, size, (chosen, cut(targets), cut(weights)))
        # Not within a branch, which would copy the gradients of a head in and out.
        total = jax.tree.map(lambda one, other: one + other.astype(one.dtype), total, more)
        if d_hidden is not None:
            put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, index * size, axis=0)  # noqa: E731
            d_sorted = jax.tree.map(put, d_sorted, d_hidden)
        return total, d_sorted

    d_sorted = tuple(jnp.zeros((order.shape[0], x_NE.shape[-1]), x_NE.dtype) for x_NE in hidden)
    total, d_sorted = jax.lax.fori_loop(0, -(-count // size), body, (total, d_sorted))
    home = jnp.argsort(order_N)
    return total, tuple(d_NE[home] for d_NE in d_sorted)


def _fitting(function, count, size, given):
    """`function` of the smallest part of a chunk of `size` tokens that holds the first `count` of them."""
    sizes = sorted({max(1, round(size * part / PARTS)) for part in range(1, PARTS + 1)})

    def part(length, *arrays):
        more, d_hidden = function(*jax.tree.map(lambda x: x[:length], arrays))
        return more, jax.tree.map(lambda d: jnp.pad(d, ((0, size - length), (0, 0))), d_hidden)

    index = jnp.searchsorted(jnp.array(sizes[:-1]), count)
    return jax.lax.switch(index, [partial(part, length) for length in sizes], *given)
