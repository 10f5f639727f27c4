"""The step that a configuration describes, with shapes in place of arrays: what `plan` compiles."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune import cpu_bfloat16, program, tune
from jaxtune.assemble import Assembled, Source, assemble
from jaxtune.attention_kernel import choose, ring_of
from jaxtune.config import Config
from jaxtune.loss import chunk_of
from jaxtune.mesh import batch_shards, check_time
from jaxtune.models.config import ModelConfig
from jaxtune.models.execution import Execution, worth_unrolling
from jaxtune.models.kernels import OWNERS, PLATFORMS
from jaxtune.number_types import compute_dtype
from jaxtune.parallel.checks import check_fit, check_offload
from jaxtune.parallel.schedule import Schedule, bubble, make_schedule
from jaxtune.plan.flops import model_flops
from jaxtune.plan.memory import tree_bytes
from jaxtune.quant.scheme import scheme_of

TOTAL_STEPS = 1_000_000  # where the run is as long as its epochs, which only the data says


@dataclass(frozen=True)
class Step:
    """A step and its arguments' shapes and shardings."""

    config: Config
    assembled: Assembled
    mesh: Mesh
    program: program.Program

    @property
    def tokens(self) -> int:
        """Of an optimiser step, all devices together, padding counted."""
        return self.config.train.batch_size * self.config.data.max_length

    @property
    def loop_trips(self) -> int:
        """Rounds of the loss's loop over a micro-batch when every token is supervised."""
        own = self.tokens // (self.config.train.micro_batches * batch_shards(self.mesh) * self.mesh.shape["context"])
        return -(-own // chunk_of(self.assembled.model.config.vocab_size // self.mesh.shape["tensor"]))

    @property
    def schedule(self) -> Schedule | None:
        """Of the pipeline, where there is one."""
        mesh, stages = self.config.mesh, self.mesh.shape["pipe"]
        if stages == 1:
            return None
        return make_schedule(mesh.schedule, stages, self.config.train.micro_batches, mesh.virtual_stages)

    @property
    def shares(self) -> tuple[float, ...]:
        """With a pipeline: in which share of its ticks a stage works, and of its work that is in the chunk with the
        head. A model's own conditions, within its layers, are counted as met."""
        schedule = self.schedule
        if schedule is None:
            return ()
        return schedule.micro_batches * schedule.virtual / schedule.ticks, 1 / schedule.virtual

    @property
    def bubble(self) -> float:
        """The share of a step in which a pipeline's stage waits."""
        return 0.0 if self.schedule is None else bubble(self.schedule)

    @property
    def model_flops(self) -> float:
        """Of a step, all devices together."""
        length = self.config.data.max_length
        model, params, mask = self.assembled.model, self.assembled.params, self.assembled.mask
        return model_flops(model.config, model.weights, mask, params, self.tokens, length)

    @property
    def gradients(self) -> Counter[str]:
        """Bytes of the gradients on one device, as they are summed up over micro-batches."""
        kind = self.assembled.model.execution.sum_dtype or jnp.float32
        homes = self.program.layout.homes(self.program.layout.grads)
        shapes = self.program.state["trainable"]
        return tree_bytes(
            jax.tree.map(lambda x, home: jax.ShapeDtypeStruct(x.shape, kind, sharding=home), shapes, homes)
        )

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the step takes, as shapes: state, frozen, batch, step."""
        return self.program.state, self.program.frozen, self._batch(), jax.ShapeDtypeStruct((), jnp.int32)

    def trace(self) -> Any:
        """The step, traced for these arguments."""
        with cpu_bfloat16.traced_for(self.mesh.devices.flat[0]):
            return self.program.train_step.trace(*self.arguments)

    def _batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        train = self.config.train
        shape = train.micro_batches, train.batch_size // train.micro_batches, self.config.data.max_length
        kinds = dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32) | {"mask": jnp.bool_}
        return {name: jax.ShapeDtypeStruct(shape, kind, sharding=self.program.rows) for name, kind in kinds.items()}


def make_step(config: Config, model: ModelConfig, mesh: Mesh) -> Step:
    """From settings alone: no weight, tokenizer or data is read, and of an adapter to start from its settings and the
    names and shapes of its tensors. Rows are data.max_length long.

    Raises:
        MeshError, AdapterError, ConfigError: as a run of this configuration would.
    """
    check_fit(config, mesh, model)
    check_offload(config, mesh)
    check_time(mesh, config.mesh, config.data.max_length)
    section = tune.resolve(config.tune)
    config = config.model_copy(update={"tune": section})
    assembled = assemble(
        Source(Path(config.model.path), model, None, scheme_of(config.model, model, config.model.path)),
        section,
        mesh,
        init="shapes",
        dtype=config.precision.params,
        execution=_execution(config, mesh, model),
    )
    steps = config.train.steps or TOTAL_STEPS
    built = program.build(config, assembled.model, mesh, assembled.params, assembled.mask, steps)
    return Step(config, assembled, mesh, built)


def _execution(config: Config, mesh: Mesh, model: ModelConfig) -> Execution:
    """A run's. How long the run is, is known where it says its steps."""
    train, kernel = config.train, _attention(config, mesh, model)
    tokens = (train.steps or 0) * train.batch_size * config.data.max_length
    unroll = worth_unrolling(config, mesh, model, tokens)
    return Execution.of(config, compute_dtype(config.precision.compute), kernel, unroll=unroll)


def _attention(config: Config, mesh: Mesh, model: ModelConfig) -> str:
    """Tiles where the devices are a CPU's, also where they stand for others: a fused kernel keeps no scores either.

    Raises:
        ConfigError: a kernel is asked for by name that a run on its own platform could not take.
    """
    asked, here = config.memory.attention, mesh.devices.flat[0].platform
    dtype, where = compute_dtype(config.precision.compute), (ring_of(config, mesh), config.data.share_prefix)
    if asked in OWNERS:  # a CPU's devices stand for those that have it
        there = next(name for name, kernel in PLATFORMS.items() if kernel == asked) if here == "cpu" else here
        theirs = jnp.bfloat16 if there != "cpu" and config.precision.compute == "auto" else dtype
        choose(asked, model, theirs, there, *where)
    kernel, _ = choose("xla" if asked == "xla" else "auto", model, dtype, here, *where)
    return "tiles" if kernel == "tiles" else "xla"
