"""One optimiser step, and one evaluation step: pure functions of state and batch, to be jitted by the loop."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxtune import float8, loss_scale, spikes
from jaxtune.float8 import NOTHING, Watch
from jaxtune.loss import cross_entropy
from jaxtune.models.decoder import Model
from jaxtune.models.rope import reach
from jaxtune.models.weights import Path, Tree
from jaxtune.ops import Noise, split_noise
from jaxtune.optim import clip, global_norm
from jaxtune.parallel import local
from jaxtune.parallel.layout import Layout
from jaxtune.parallel.offload import fetched, stored
from jaxtune.parallel.pipeline import Pipeline
from jaxtune.parallel.zigzag import positions_of
from jaxtune.tune.method import Course
from jaxtune.update import gated, make_update

Batch = dict[str, jax.Array]  # tokens, targets, mask, positions, segments: each [micro-batches, rows, time]
EVERYWHERE = PartitionSpec()


def init_state(
    trainable: Tree,
    optimizer: optax.GradientTransformation,
    scale: float = 1.0,
    watch: Watch = NOTHING,
    kept: Callable[[Tree], Tree] | None = None,
) -> Tree:
    """Everything that a step changes. The step's number and the seed give all random keys.

    scale: the first one of a float16 loss. watch: what float8 keeps histories of. kept: what the tuning method keeps.
    """
    state = {"trainable": trainable, "optimizer": optimizer.init(trainable)}
    own = {} if kept is None else {"method": kept(trainable)}
    return {**state, **own, "guard": loss_scale.init(scale), "spikes": spikes.init(), "float8": watch.init()}


def batch_loss(
    model: Model, params: Tree, batch: Batch, scale: jax.Array, dtype: Any, noise: Noise | None
) -> jax.Array:
    """This device's share of the losses of one micro-batch's supervised tokens, times `scale`: a float32 scalar."""
    body_noise, head_noise = split_noise(noise, 2)
    tokens, positions, segments = batch["tokens"], batch["positions"], batch["segments"]
    hidden, _ = model.hidden(params, tokens, positions, segments, dtype, body_noise, length=batch.get("length"))
    return cross_entropy(hidden, model.head(params, dtype), batch["targets"], batch["mask"] * scale, head_noise)


def _with_length(model: Model, batch: Batch) -> Batch:
    """With the length that the rotations of all micro-batches are scaled by, where they are: that of the longest."""
    length = reach(model.config.rope, batch["positions"])
    return batch if length is None else {**batch, "length": jnp.full(batch["tokens"].shape[0], length)}


def token_numbers(micro: Any, rows: int, time: int) -> jax.Array:
    """The numbers in the whole batch of this device's tokens of a micro-batch: [rows, time].

    A token has the same one on any mesh and for any split into micro-batches.
    """
    data, fsdp = local.ROWS
    place = (micro * local.size(data) + local.index(data)) * local.size(fsdp) + local.index(fsdp)
    columns = positions_of(local.index("context"), time, local.size("context"))
    return (place * rows + jnp.arange(rows))[:, None] * (time * local.size("context")) + columns


def make_gradients(model: Model, layout: Layout, dtype: Any, seed: int, pipeline: Pipeline | None = None) -> Callable:
    """(trainable, frozen, batch, step, factor, scales) -> (loss, gradients, sizes), on whole arrays.

    Both are multiplied by `factor` and divided by the supervised tokens of the whole batch, so that any split into
    micro-batches and over devices gives the same update. scales: float8's delayed ones; sizes: what is seen of the
    tensors that they are for.
    """
    sum_dtype = model.execution.sum_dtype or jnp.float32

    def gradients(
        trained: list, frozen: list, batch: Batch, step: jax.Array, factor: jax.Array, scales: Tree
    ) -> tuple[jax.Array, list, Tree]:
        batch = _with_length(model, batch)
        supervised = local.total(jnp.sum(batch["mask"].astype(jnp.float32)), *local.ROWS, "context")
        scale = factor / jnp.maximum(supervised, 1.0)
        key = jax.random.fold_in(jax.random.key(seed), step)

        noise_of = lambda index: Noise(key, token_numbers(index, *batch["tokens"].shape[1:]))  # noqa: E731
        axes = layout.mesh.axis_names
        if pipeline is not None:
            share, grads, sizes = pipeline.gradients(trained, frozen, batch, scale, noise_of, scales)
            return local.total(share, *axes), layout.summed(grads), local.largest(sizes, *axes)

        def micro(index: Any, micro_batch: Batch) -> tuple[tuple[jax.Array, list], Tree]:
            def loss(trained: list, scales: Tree) -> jax.Array:
                params = float8.attach(layout.params(trained, frozen), scales)
                return batch_loss(model, params, micro_batch, scale, dtype, noise_of(index))

            share, (grads, sizes) = jax.value_and_grad(loss, argnums=(0, 1))(trained, scales)
            return (share, [grad.astype(sum_dtype) for grad in layout.scattered(grads)]), sizes

        def join(total: Any, more: Any) -> Any:
            return added(total[0], more[0]), jax.tree.map(jnp.maximum, total[1], more[1])

        (share, grads), sizes = accumulated(micro, batch, join)
        return local.total(share, *axes), layout.summed(grads), local.largest(sizes, *axes)

    return layout.region(gradients, (EVERYWHERE, layout.split_grads, EVERYWHERE))


def added(total: Any, more: Any) -> Any:
    """The sum of two trees."""
    return jax.tree.map(jnp.add, total, more)


def accumulated(function: Callable[[Any, Batch], Any], batch: Batch, join: Callable = added) -> Any:
    """`function(index, micro-batch)` of the micro-batches, one after another, joined from zeros on: summed up."""
    count = batch["tokens"].shape[0]
    first = {name: array[0] for name, array in batch.items()}
    if count == 1:
        return function(0, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, 0, first))

    def body(total, inputs):
        return join(total, function(*inputs)), None

    return jax.lax.scan(body, zeros, (jnp.arange(count), batch))[0]


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[jax.Array], jax.Array],
    layout: Layout,
    homes: Tree,
    *,
    clip_norm: float | None,
    dtype: Any,
    seed: int,
    pipeline: Pipeline | None = None,
    gates: dict[Path, jax.Array] | None = None,
    numbers: dict[Path, jax.Array] | None = None,
    rates: Tree | None = None,
    course: Course | None = None,
    scale_window: int | None = None,
    skip_spikes: float | None = None,
) -> Callable[[Tree, Tree, Batch, jax.Array], tuple[Tree, dict[str, jax.Array]]]:
    """(state, frozen params, batch, step) -> (state, metrics).

    homes: where the state's arrays lie between steps. Donate the state, and pass the homes as its out_shardings.
    pipeline: what computes the gradients, if it is one. gates: of a stack, 1 for each layer that trains.
    numbers: of a part that is larger in some layers than in others, how many each has (optim.make_optimizer).
    rates: factors of the learning rate, in the structure of what trains.
    course: what the tuning method does besides; its penalty is part of the loss.
    scale_window: that of a float16 loss (loss_scale.py); None: the loss is not scaled.
    skip_spikes: standard deviations above the mean of the last good losses that are too many (spikes.py).
    A loss or gradient that is not finite, and a spike, leave params and optimiser as they were, bit for bit, but
    for what the course does at such a step too.
    """
    gradients = make_gradients(model, layout, dtype, seed, pipeline)
    update = make_update(optimizer, layout, homes, gates or {}, numbers or {}, rates, course)

    def train_step(state: Tree, frozen: Tree, batch: Batch, step: jax.Array) -> tuple[Tree, dict[str, jax.Array]]:
        factor = jnp.float32(1) if scale_window is None else state["guard"]["loss_scale"]
        scales = float8.delayed_scales(state["float8"])
        loss, grads, sizes = gradients(state["trainable"], frozen, batch, step, factor, scales)
        if scale_window is not None:
            loss, grads = loss_scale.unscaled(loss, grads, factor)
        if course is not None:
            trains = layout.pinned(fetched(state["trainable"], homes["trainable"]))
            penalty, more = jax.value_and_grad(course.penalty)(trains)
            loss, grads = loss + penalty, jax.tree.map(lambda x, own: x + own.astype(x.dtype), grads, more)
        grads = gated(grads, gates or {})
        norm = global_norm(grads)
        finite, lr = jnp.isfinite(loss) & jnp.isfinite(norm), schedule(step)
        spike = finite & (False if skip_spikes is None else spikes.is_spike(state["spikes"], loss, skip_spikes))
        good = finite & ~spike
        grads = layout.pinned(clip(grads, norm, clip_norm))
        guard = loss_scale.advance(state["guard"], finite, scale_window, spike)
        seen = jax.tree.map(partial(jnp.where, good), float8.remember(state["float8"], sizes), state["float8"])
        watched = {"guard": guard, "spikes": spikes.advance(state["spikes"], loss, good), "float8": seen}
        new = stored({**update(state, grads, lr, good, step), **watched}, homes)
        return new, {"loss": loss, "grad_norm": norm, "lr": lr, "spike": spike, **guard}

    return train_step


def make_eval_step(
    model: Model, layout: Layout, dtype: Any, pipeline: Pipeline | None = None
) -> Callable[[Tree, Tree, Batch], tuple[jax.Array, jax.Array]]:
    """(trainable, frozen, batch) -> (sum of the supervised tokens' losses, their number)."""

    def losses(trained: list, frozen: list, batch: Batch) -> jax.Array:
        batch = _with_length(model, batch)
        if pipeline is not None:
            share = pipeline.losses(trained, frozen, batch, jnp.float32(1))
            return local.total(share, *layout.mesh.axis_names)
        params = layout.params(trained, frozen)

        def micro(_: Any, micro_batch: Batch) -> jax.Array:
            return batch_loss(model, params, micro_batch, jnp.float32(1), dtype, None)

        return local.total(accumulated(micro, batch), *layout.mesh.axis_names)

    region = layout.region(losses, EVERYWHERE)

    def eval_step(trainable: Tree, frozen: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return region(trainable, frozen, batch), jnp.sum(batch["mask"].astype(jnp.float32))

    return eval_step
