"""The programs of a run, from its configuration and its parameters' shapes: what the loop runs and `plan` reads."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxtune import tune
from jaxtune.config import Config
from jaxtune.cpu_bfloat16 import compiler_options
from jaxtune.float8 import NOTHING, Watch
from jaxtune.leaves import combine, partition
from jaxtune.mesh import BATCH
from jaxtune.models.decoder import Model
from jaxtune.models.weights import Tree
from jaxtune.number_types import compute_dtype
from jaxtune.optim import make_optimizer, make_schedule
from jaxtune.parallel.layout import Layout, partitions
from jaxtune.parallel.pipeline import Pipeline
from jaxtune.parallel.schedule import make_schedule as make_pipeline_schedule
from jaxtune.parallel.stages import Stages
from jaxtune.parallel.zigzag import into_zigzag
from jaxtune.state import abstract, make_state
from jaxtune.step import make_eval_step, make_train_step


@dataclass
class Program:
    """A step and an evaluation, ready to be compiled, and what they start from.

    state, frozen: arrays, or their shapes where the parameters were shapes. homes: of the state, between steps.
    """

    layout: Layout
    state: Tree
    frozen: Tree
    homes: Tree
    train_step: Any  # jitted: (state, frozen, batch, step) -> (state, metrics); the state is given up
    eval_step: Any  # jitted: (trainable, frozen, batch) -> (sum of losses, tokens)
    pipeline: Pipeline | None

    @property
    def stages(self) -> Stages | None:
        """Of the pipeline."""
        return None if self.pipeline is None else self.pipeline.stages

    @property
    def rows(self) -> NamedSharding:
        """Where a batch lies."""
        return NamedSharding(self.layout.mesh, BATCH)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch onto the mesh, each sequence in the order that the context axis wants: every process gives the rows
        of its own devices."""
        parts = self.layout.mesh.shape["context"]

        def place(array: np.ndarray) -> jax.Array:
            ordered = into_zigzag(array, parts, array.ndim - 1)
            return jax.make_array_from_callback(ordered.shape, self.rows, ordered.__getitem__)

        return {name: place(array) for name, array in batch.items()}

    def saved(self, state: Tree) -> Tree:
        """A state as checkpoints have it: its layers in order, whatever the pipeline."""
        if self.stages is None:
            return state
        return jax.jit(self.stages.unstaged, out_shardings=self.stages.unstaged_homes(state))(state)

    def saved_shape(self) -> Tree:
        """The shapes and shardings of what `saved` gives."""
        return abstract(self.state) if self.stages is None else self.stages.unstaged_shape(abstract(self.state))

    def loaded(self, saved: Tree) -> Tree:
        """A state as the step takes it, from one as checkpoints have it."""
        if self.stages is None:
            return saved
        return self.stages.brought(saved, self.homes)

    def params(self, state: Tree) -> Tree:
        """All parameters of a state, their layers in order."""
        params = combine(state["trainable"], self.frozen)
        if self.stages is None:
            return params
        return jax.jit(self.stages.unstaged, out_shardings=self.stages.unstaged_homes(params))(params)


def build(config: Config, model: Model, mesh: Mesh, params: Tree, mask: Tree, total_steps: int) -> Program:
    """The programs for these parameters, which may be jax.ShapeDtypeStructs with shardings.

    With a pipeline, the parameters are given up: they are brought into the order of its stages.

    Raises:
        MeshError: the layers or the micro-batches do not fit the pipeline.
    """
    stages = _stages(config, mesh, model)
    gates = tune.gates(config.tune, model.weights)
    if stages is not None:
        params = _staged(stages, model, mesh, params, config.mesh.zero)
    trainable, frozen = partition(params, mask)
    layout = Layout.of(mesh, model.config, model.weights, trainable, frozen, config.mesh.zero)
    shapes = tune.shapes(config.tune, model.weights)
    optimizer = make_optimizer(config.optim, model.weights, mesh.shape, shapes)
    precision = config.precision
    is_delayed = precision.float8_scaling == "delayed"
    places = None if stages is None else stages.numbers.size
    watch = Watch.of(model.weights, mask, precision.float8_history, places) if is_delayed else NOTHING
    offload = tuple(config.memory.offload)
    course = tune.course(config.tune, model.weights, total_steps)
    kept = None if course is None else course.kept
    state, homes = make_state(trainable, optimizer, layout, offload, precision.loss_scale.initial, watch, kept)
    dtype = compute_dtype(config.precision.compute)
    pipeline = None if stages is None else _pipeline(config, model, layout, stages, dtype)
    step = make_train_step(
        model,
        optimizer,
        make_schedule(config.optim, total_steps),
        layout,
        homes,
        clip_norm=config.optim.clip_norm,
        dtype=dtype,
        seed=config.train.seed,
        pipeline=pipeline,
        gates=_by_layer(gates, stages),
        numbers=_by_layer({path: list(map(math.prod, own)) for path, own in shapes.items()}, stages),
        course=course,
        rates=tune.rates(config.tune, model.weights, trainable, config.optim.lr),
        scale_window=precision.loss_scale.window if precision.compute == "float16" else None,
        skip_spikes=config.train.skip_spikes,
    )
    # The state is the first result: behind others, CUDA has given donated arrays wrong numbers (jax issue 39625).
    options = compiler_options(dtype, mesh.devices.flat[0])
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(homes, None), compiler_options=options)
    eval_step = jax.jit(make_eval_step(model, layout, dtype, pipeline), compiler_options=options)
    return Program(layout, state, frozen, homes, jitted, eval_step, pipeline)


def _stages(config: Config, mesh: Mesh, model: Model) -> Stages | None:
    if mesh.shape["pipe"] == 1:
        return None
    return Stages.of(model.config.num_layers, mesh.shape["pipe"], config.mesh.virtual_stages)


def _staged(stages: Stages, model: Model, mesh: Mesh, params: Tree, zero: int) -> Tree:
    specs = partitions(mesh, model.config, model.weights, params, zero=zero)
    kind = model.execution.places[1]
    homes = jax.tree.map(lambda s: NamedSharding(mesh, s, memory_kind=kind), specs)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        shapes = jax.eval_shape(stages.staged, params)
        return jax.tree.map(lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), shapes, homes)
    return stages.brought(params, homes)


def _pipeline(config: Config, model: Model, layout: Layout, stages: Stages, dtype: Any) -> Pipeline:
    mesh, micro_batches = layout.mesh, config.train.micro_batches
    schedule = make_pipeline_schedule(
        config.mesh.schedule, mesh.shape["pipe"], micro_batches, config.mesh.virtual_stages
    )
    return Pipeline(model, layout, stages, schedule, dtype)


def _by_layer(numbers: dict, stages: Stages | None) -> dict:
    """path -> a number for each layer along axis 0, 0 for a place without one."""
    arrays = {path: jnp.asarray(layers, jnp.float32) for path, layers in numbers.items()}
    if stages is None:
        return arrays
    return {path: stages.staged({"stacks": array})["stacks"] for path, array in arrays.items()}
