"""One optimiser step, and one evaluation step: pure functions of state and batch, to be jitted by the loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune import loss_scale
from jaxtune.leaves import combine
from jaxtune.loss import cross_entropy
from jaxtune.models.decoder import Model
from jaxtune.models.weights import Tree
from jaxtune.ops import split_keys
from jaxtune.optim import clip, descend, global_norm

Batch = dict[str, jax.Array]  # tokens, targets, mask, positions, segments: each [micro-batches, rows, time]


def init_state(trainable: Tree, optimizer: optax.GradientTransformation, scale: float = 1.0) -> Tree:
    """Everything that a step changes. The step's number and the seed give all random keys. scale: of a float16 loss."""
    return {"trainable": trainable, "optimizer": optimizer.init(trainable), "guard": loss_scale.init(scale)}


def batch_loss(
    model: Model, params: Tree, batch: Batch, scale: jax.Array, dtype: Any, parts: int, key: jax.Array | None
) -> jax.Array:
    """Sum of the losses of one micro-batch's supervised tokens, times `scale`: a float32 scalar."""
    body_key, head_key = split_keys(key, 2)
    hidden, _ = model.hidden(params, batch["tokens"], batch["positions"], batch["segments"], dtype, body_key)
    return cross_entropy(hidden, model.head(params), batch["targets"], batch["mask"] * scale, parts, head_key)


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    *,
    clip_norm: float | None,
    dtype: Any,
    seed: int,
    parts: int,
    scale_window: int | None = None,
) -> Callable[[Tree, Tree, Batch, jax.Array], tuple[Tree, dict[str, jax.Array]]]:
    """(state, frozen params, batch, step) -> (state, metrics).

    scale_window: that of loss_scale.py; None: the loss is not scaled.

    Losses and gradients are divided by the supervised tokens of the whole batch, so that any split into
    micro-batches gives the same update. A loss or gradient that is not finite leaves params and optimiser
    as they were, bit for bit.
    """

    def gradients(trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array, factor: Any) -> tuple[jax.Array, Tree]:
        scale = factor / jnp.maximum(jnp.sum(batch["mask"].astype(jnp.float32)), 1.0)

        def micro(micro_batch: Batch, key: jax.Array) -> tuple[jax.Array, Tree]:
            def loss(trainable: Tree) -> jax.Array:
                return batch_loss(model, combine(trainable, frozen), micro_batch, scale, dtype, parts, key)

            return jax.value_and_grad(loss)(trainable)

        count = batch["tokens"].shape[0]
        if count == 1:
            return micro({name: array[0] for name, array in batch.items()}, jax.random.fold_in(key, 0))

        def body(total, inputs):
            index, micro_batch = inputs
            return jax.tree.map(jnp.add, total, micro(micro_batch, jax.random.fold_in(key, index))), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
        return jax.lax.scan(body, (jnp.float32(0), zeros), (jnp.arange(count), batch))[0]

    def train_step(state: Tree, frozen: Tree, batch: Batch, step: jax.Array) -> tuple[Tree, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), step)
        factor = 1.0 if scale_window is None else state["guard"]["loss_scale"]
        loss, grads = gradients(state["trainable"], frozen, batch, key, factor)
        if scale_window is not None:
            loss, grads = loss_scale.unscaled(loss, grads, factor)
        norm = global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        direction, moved = optimizer.update(clip(grads, norm, clip_norm), state["optimizer"], state["trainable"])
        lr = schedule(step)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        guard = loss_scale.advance(state["guard"], finite, scale_window)
        new = {
            "trainable": jax.tree.map(keep, descend(state["trainable"], direction, lr), state["trainable"]),
            "optimizer": jax.tree.map(keep, moved, state["optimizer"]),
            "guard": guard,
        }
        return new, {"loss": loss, "grad_norm": norm, "lr": lr, **guard}

    return train_step


def make_eval_step(model: Model, dtype: Any, parts: int) -> Callable[[Tree, Tree, Batch], tuple[jax.Array, jax.Array]]:
    """(trainable, frozen, batch) -> (sum of the supervised tokens' losses, their number)."""

    def eval_step(trainable: Tree, frozen: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params = combine(trainable, frozen)

        def body(total, micro_batch):
            return total + batch_loss(model, params, micro_batch, jnp.float32(1), dtype, parts, None), None

        total, _ = jax.lax.scan(body, jnp.float32(0), batch)
        return total, jnp.sum(batch["mask"].astype(jnp.float32))

    return eval_step
