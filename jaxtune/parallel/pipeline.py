"""One executor for every pipeline schedule: a scan over the ticks of its table (parallel/schedule.py).

In each tick a stage runs at most one forward, then at most one backward, which computes its stage again from the
stage's saved input; then activations move up a stage and gradients down, by ppermute. An idle slot costs nothing,
but where the context axis is split (local.when).

Legend: S stages, V chunks on each, K saved inputs, M micro-batches; B, T, E as in the decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import float8
from jaxtune.loss import cross_entropy
from jaxtune.models.decoder import Model
from jaxtune.models.weights import Tree
from jaxtune.ops import Noise, split_noise
from jaxtune.parallel import local
from jaxtune.parallel.layout import Layout
from jaxtune.parallel.schedule import Schedule
from jaxtune.parallel.stages import STACKS, Stages

Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class Pipeline:
    """A model cut into stages, and the schedule that its micro-batches follow."""

    model: Model
    layout: Layout
    stages: Stages
    schedule: Schedule
    dtype: Any

    def gradients(
        self,
        trained: list,
        frozen: list,
        batch: Batch,
        scale: jax.Array,
        noise_of: Callable[[Any], Noise],
        scales: Tree,
    ) -> tuple[jax.Array, list, Tree]:
        """This device's share of the loss, and of the gradients summed over micro-batches, inside the region; and
        the largest sizes that its float8 tensors had.

        scale: of each token's loss. noise_of: micro-batch -> noise. scales: float8's delayed ones, of all stages;
        the sizes are of all stages too.
        """
        scales = jax.tree.map(lambda x: local.part(x, "pipe", 0), scales)
        run = _Run(self, trained, frozen, batch, scale, noise_of, scales)
        sum_dtype = self.model.execution.sum_dtype or jnp.float32
        shapes = jax.eval_shape(self.layout.scattered, trained)
        sums = [jnp.zeros(x.shape, sum_dtype) for x in shapes]
        done = jnp.float32(0), sums, jax.tree.map(jnp.zeros_like, scales)
        start = run.buffer(self.schedule.num_slots), run.buffer(self.schedule.num_grad_slots), done

        def tick(carry, row):
            saved, incoming, done = carry
            up = run.forward(row, saved)
            down, done = run.backward(row, saved, incoming, done)
            saved = _put(saved, row["recv_f_slot"], _shift(up, 1))
            incoming = _put(incoming, row["recv_b_slot"], _shift(down, -1))
            return (saved, incoming, done), None

        loss, sums, sizes = jax.lax.scan(tick, start, self._rows(backward=True))[0][2]
        return loss, sums, jax.tree.map(lambda x: local.gathered(x, "pipe", 0), sizes)

    def losses(self, trained: list, frozen: list, batch: Batch, scale: jax.Array) -> jax.Array:
        """This device's share of the loss, without dropout and without gradients."""
        run = _Run(self, trained, frozen, batch, scale, lambda _: None, {})

        def tick(carry, row):
            saved, loss = carry
            loss = loss + run.last_loss(row, saved)
            saved = _put(saved, row["recv_f_slot"], _shift(run.forward(row, saved), 1))
            return (saved, loss), None

        start = run.buffer(self.schedule.num_slots), jnp.float32(0)
        return jax.lax.scan(tick, start, self._rows(backward=False))[0][1]

    def _rows(self, backward: bool) -> dict[str, jax.Array]:
        """This stage's columns of the tables, [ticks] each."""
        names = ["f_micro", "f_chunk", "f_slot", "recv_f_slot"]
        names += ["b_micro", "b_chunk", "b_slot", "b_grad_slot", "recv_b_slot"] if backward else []
        ticks = (
            self.schedule.ticks if backward else 1 + int((self.schedule.f_micro >= 0).any(axis=1).nonzero()[0].max())
        )
        stage = local.index("pipe")
        return {name: jnp.asarray(getattr(self.schedule, name)[:ticks])[:, stage] for name in names}


@dataclass(frozen=True)
class _Run:
    """One step of a pipeline on one device."""

    pipeline: Pipeline
    trained: list
    frozen: list
    batch: Batch
    scale: jax.Array
    noise_of: Callable[[Any], Noise | None]
    scales: Tree  # of float8, of this stage

    def buffer(self, slots: int) -> jax.Array:
        """Stage inputs or output gradients: `slots` of them, and a last place for what nobody needs."""
        model = self.pipeline.model
        tokens = jax.eval_shape(lambda x: x[0], self.batch["tokens"])
        params = self.pipeline.layout.params(self.trained, self.frozen)
        like = jax.eval_shape(partial(model.embed, dtype=self.pipeline.dtype), params, tokens)
        return jnp.zeros((slots + 1, *like.shape), like.dtype)

    def forward(self, row: Batch, saved: jax.Array) -> jax.Array:
        """What a stage hands on. The last chunk's forward is part of its backward, and skipped here."""
        active = (row["f_micro"] >= 0) & (row["f_chunk"] != self.last_chunk)

        def run(x):
            return self.chunk(self.trained, self.frozen, row["f_micro"], row["f_chunk"], x)

        return local.when(active, run, jnp.zeros_like, saved[row["f_slot"]])

    def backward(self, row: Batch, saved, incoming, done) -> tuple[jax.Array, tuple]:
        """The gradient of the stage's input, and `done` (loss, sums, sizes) with this tick's share added."""
        micro, chunk = row["b_micro"], row["b_chunk"]
        is_last = chunk == self.last_chunk
        x, dy = saved[row["b_slot"]], jnp.where(is_last, 0, incoming[row["b_grad_slot"]]).astype(saved.dtype)
        layout = self.pipeline.layout
        frozen = self._chunk_of(self.frozen, layout.frozen, chunk)

        def run(x, dy, done):
            def function(trained, x, scales):
                return self._with_loss(trained, frozen, scales, micro, chunk, x)

            # Near at once, not layer by layer: jax cannot bring a gradient to the host out of a cond.
            trained = [local.near(x) for x in self._chunk_of(self.trained, layout.trainable, chunk)]
            (_, share), pull = jax.vjp(function, trained, x, self._scales_of(chunk))
            grads, dx, seen = pull((dy, jnp.float32(1)))
            loss, sums, sizes = done
            sums = self._added(sums, layout.scattered(grads), chunk)
            return dx, (loss + share, sums, jax.tree.map(partial(self._seen, chunk), sizes, seen))

        def idle(x, dy, done):
            return jnp.zeros_like(x), done

        return local.when(micro >= 0, run, idle, x, dy, done)

    def last_loss(self, row: Batch, saved: jax.Array) -> jax.Array:
        """The loss of the micro-batch whose last chunk is due."""
        micro, chunk = row["f_micro"], row["f_chunk"]

        def run(x):
            trained = self._chunk_of(self.trained, self.pipeline.layout.trainable, chunk)
            frozen = self._chunk_of(self.frozen, self.pipeline.layout.frozen, chunk)
            return self._with_loss(trained, frozen, {}, micro, chunk, x)[1]

        return local.when(
            (micro >= 0) & (chunk == self.last_chunk), run, lambda x: jnp.float32(0), saved[row["f_slot"]]
        )

    @property
    def last_chunk(self) -> int:
        return self.pipeline.schedule.stages * self.pipeline.schedule.virtual - 1

    def chunk(self, trained: list, frozen: list, micro: Any, chunk: Any, x: jax.Array) -> jax.Array:
        """The layers of a chunk, after the embedding where it is the first. All leaves are of the whole stage."""
        trained = self._chunk_of(trained, self.pipeline.layout.trainable, chunk)
        frozen = self._chunk_of(frozen, self.pipeline.layout.frozen, chunk)
        return self._layers(self.pipeline.layout.params(trained, frozen), self._scales_of(chunk), micro, chunk, x)

    def _with_loss(self, trained: list, frozen: list, scales: Tree, micro: Any, chunk: Any, x: jax.Array):
        """(output, loss share) of a chunk whose own leaves are given; the loss is 0 but for the last chunk."""
        model, dtype = self.pipeline.model, self.pipeline.dtype
        params = self.pipeline.layout.params(trained, frozen)
        y = self._layers(params, scales, micro, chunk, x)
        batch = self._micro(micro)
        noise = split_noise(self.noise_of(micro), 2)[1]

        def head(params, y):
            weights = batch["mask"] * self.scale
            return cross_entropy(model.final(params, y), model.head(params, dtype), batch["targets"], weights, noise)

        return y, jax.lax.cond(chunk == self.last_chunk, head, lambda *_: jnp.float32(0), params, y)

    def _layers(self, params: Tree, scales: Tree, micro: Any, chunk: Any, x: jax.Array) -> jax.Array:
        model, batch = self.pipeline.model, self._micro(micro)
        noise = split_noise(self.noise_of(micro), 2)[0]
        embed = lambda params, x: model.embed(params, batch["tokens"], self.pipeline.dtype, noise)  # noqa: E731
        x = jax.lax.cond(chunk == 0, embed, lambda params, x: x, params, x)
        tokens, positions, segments = batch["tokens"], batch["positions"], batch["segments"]
        context, _ = model.context(params, tokens, positions, segments, length=batch.get("length"))
        numbers = jnp.asarray(self.pipeline.stages.numbers)[local.index("pipe"), chunk // self.pipeline.schedule.stages]
        has_gaps = not self.pipeline.stages.is_even
        stack = float8.attach(params, scales)[STACKS]["0"]
        return model.layers(stack, numbers, x, context, noise, has_gaps=has_gaps)[0]

    def _micro(self, micro: Any) -> Batch:
        return {name: array[micro] for name, array in self.batch.items()}

    def _chunk_of(self, leaves: list, specs: Tree, chunk: Any) -> list:
        """The part of a stage's leaves that is one chunk's."""
        virtual = self.pipeline.schedule.virtual
        if virtual == 1:
            return leaves
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, self._at(x, chunk), x.shape[0] // virtual)  # noqa: E731
        return [cut(x) if stacked else x for x, stacked in zip(leaves, _stacked(specs), strict=True)]

    def _scales_of(self, chunk: Any) -> Tree:
        virtual = self.pipeline.schedule.virtual
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, self._at(x, chunk), x.shape[0] // virtual)  # noqa: E731
        return jax.tree.map(cut, self.scales)

    def _seen(self, chunk: Any, sizes: jax.Array, seen: jax.Array) -> jax.Array:
        """`sizes` of the stage with a chunk's, where they are larger."""
        at = self._at(sizes, chunk)
        here = jnp.maximum(jax.lax.dynamic_slice_in_dim(sizes, at, seen.shape[0]), seen)
        return jax.lax.dynamic_update_slice_in_dim(sizes, here, at, 0)

    def _added(self, sums: list, grads: list, chunk: Any) -> list:
        """`sums` with a chunk's gradients added where they belong."""
        if self.pipeline.schedule.virtual == 1:
            return [total + grad.astype(total.dtype) for total, grad in zip(sums, grads, strict=True)]
        result = []
        for total, grad, stacked in zip(sums, grads, _stacked(self.pipeline.layout.trainable), strict=True):
            if not stacked:
                result.append(total + grad.astype(total.dtype))
                continue
            at = self._at(total, chunk)
            here = jax.lax.dynamic_slice_in_dim(total, at, grad.shape[0]) + grad.astype(total.dtype)
            result.append(jax.lax.dynamic_update_slice_in_dim(total, here, at, 0))
        return result

    def _at(self, x: jax.Array, chunk: Any) -> Any:
        """The first place of a chunk along axis 0."""
        schedule = self.pipeline.schedule
        return jnp.maximum(chunk, 0) // schedule.stages * (x.shape[0] // schedule.virtual)


def _stacked(specs: Tree) -> list[bool]:
    """For each leaf of a tree of partitions: whether it is a stack of layers."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(specs)]
    return [getattr(path[0], "key", None) == STACKS for path in paths]


def _put(buffer: jax.Array, slot: Any, value: jax.Array) -> jax.Array:
    """-1 is the last place, which nobody reads."""
    return jax.lax.dynamic_update_index_in_dim(buffer, value, jnp.where(slot < 0, buffer.shape[0] - 1, slot), 0)


def _shift(x: jax.Array, by: int) -> jax.Array:
    """What the stage before (by 1) or after (by -1) has."""
    stages = local.size("pipe")
    return jax.lax.ppermute(x, "pipe", [(s, (s + by) % stages) for s in range(stages)])
