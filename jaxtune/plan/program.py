"""The step that a configuration describes, with shapes in place of arrays: what `plan` compiles."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune import tune
from jaxtune.assemble import compute_dtype
from jaxtune.config import Config
from jaxtune.leaves import partition
from jaxtune.mesh import RULES, axes_sharding, batch_shards, check_batch, check_model, shardings
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import Model
from jaxtune.models.weights import Tree, map_tree
from jaxtune.optim import make_optimizer, make_schedule, state_shardings
from jaxtune.step import init_state, make_train_step


@dataclass(frozen=True)
class Program:
    """A jitted step and its arguments (state, frozen, batch, step), shapes with shardings, on a mesh."""

    config: Config
    model: Model
    mesh: Mesh
    step: Any
    arguments: tuple[Any, ...]
    params: Tree
    mask: Tree
    time: int

    @property
    def state(self) -> Tree:
        return self.arguments[0]

    @property
    def tokens(self) -> int:
        """Of an optimiser step, padding counted."""
        return self.config.train.batch_size * self.time

    def trace(self) -> Any:
        with jax.set_mesh(self.mesh):
            return self.step.trace(*self.arguments)


def build(config: Config, model_config: ModelConfig, mesh: Mesh) -> Program:
    """From settings alone: no weight, tokenizer or data is read. Rows are data.max_length long."""
    check_batch(mesh, config.train.batch_size, config.train.micro_batches)
    check_model(mesh, model_config)
    section = tune.resolve(config.tune)
    settings, stacks = tune.layout(section, model_config)
    model = Model.create(settings, stacks)
    stored = Model.create(model_config, stacks).weights
    dtype = jnp.dtype(config.precision.params)
    params = map_tree(
        lambda weight, where: jax.ShapeDtypeStruct(weight.full_shape, dtype, sharding=where),
        stored,
        shardings(mesh, settings, stored),
    )
    params, mask = tune.apply(section, params, model.weights, config.train.seed, axes_sharding(mesh, settings))
    trainable, frozen = partition(params, mask)
    optimizer = make_optimizer(config.optim, model.weights)
    state, where = _state(trainable, optimizer, mesh)
    step = make_train_step(
        model,
        optimizer,
        make_schedule(config.optim, config.train.steps or 1000),
        clip_norm=config.optim.clip_norm,
        dtype=compute_dtype(config.precision.compute),
        seed=config.train.seed,
        parts=batch_shards(mesh),
    )
    arguments = (state, frozen, _batch(config, mesh), jax.ShapeDtypeStruct((), jnp.int32))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    return Program(config, model, mesh, jitted, arguments, params, mask, config.data.max_length)


def _state(trainable: Tree, optimizer: Any, mesh: Mesh) -> tuple[Tree, Tree]:
    shapes = jax.eval_shape(lambda trainable: init_state(trainable, optimizer), trainable)
    homes = jax.tree.map(lambda array: array.sharding, trainable)
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes["guard"])
    moments = state_shardings(shapes["optimizer"], trainable, homes)
    where = {"trainable": homes, "optimizer": moments, "guard": everywhere}
    return jax.tree.map(lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), shapes, where), where


def _batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    micro_batches = config.train.micro_batches
    shape = (micro_batches, config.train.batch_size // micro_batches, config.data.max_length)
    where = NamedSharding(mesh, PartitionSpec(None, RULES["batch"], None))
    kinds = dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32) | {"mask": jnp.bool_}
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=where) for name, kind in kinds.items()}
