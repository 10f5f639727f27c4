"""What has to be right of a configuration before its run: that the model fits the devices, the disk's room, the data,
and that its method learns the same however a batch is packed and cut. Weights are neither needed nor read: a narrow
random model stands for the real one.
"""

import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import tune
from jaxtune.assemble import Source, assemble
from jaxtune.checkpoint import state_bytes
from jaxtune.config import Config, MemorySection, MeshSection, OptimSection, PrecisionSection
from jaxtune.data.examples import Examples, join
from jaxtune.data.loader import Data, Dataset, build_data
from jaxtune.doctor.check import Check, NotHere, Problem
from jaxtune.doctor.machine import existing, require_close
from jaxtune.errors import AdapterError, UserError
from jaxtune.leaves import count
from jaxtune.mesh import make_mesh, single_device_mesh
from jaxtune.models.execution import Execution
from jaxtune.plan.program import Step, make_step
from jaxtune.program import Program, build

HIDDEN, MLP, HEADS = 64, 128, 4  # of the model that stands for the real one
EXAMPLES, LONGEST = 4, 96  # conversations that are tried, and the tokens at the end of each
PLAIN = OptimSection(name="sgd", lr=1.0, schedule="constant", warmup=0, clip_norm=None)  # the change is the gradient
TOLERANCE = 1e-4


class Examined:
    """A configuration, and what several checks need of it; each part is made when it is first asked for."""

    def __init__(self, config: Config):
        self.config = config.model_copy(update={"tune": tune.resolve(config.tune)})

    def checks(self) -> list[Check]:
        """All of them."""
        look = "the message says what and where; docs/config.md has every key"
        same = "do not train with it: report it, with the configuration's `tune` section"
        return [
            Check("model and mesh", self.fits, look),
            Check("room for checkpoints", self.room, "make room, lower checkpoint.keep, or move train.output_dir"),
            Check("data and labels", self.labels, look),
            Check("packed = unpacked", self.packing, same),
            Check("micro-batches = whole batch", self.micro_batches, same),
        ]

    @cached_property
    def source(self) -> Source:
        """The model's settings and tokenizer; of a hub id nothing else is fetched."""
        section = self.config.model.model_copy(update={"init": "random"})
        return Source.open(section, self.config.data.template, self.config.tune)

    @cached_property
    def data(self) -> Data:
        """All of it."""
        virtual = tune.virtual_ids(self.source.tuning, self.source.config)
        config = self.config
        vocab_size = tune.vocab_size(self.source.tuning, self.source.config)
        return build_data(config.data, config.eval, config.train, self.source.tokenizer, virtual, vocab_size)

    @cached_property
    def _whole_step(self) -> Step:
        """That of the real model on the real mesh, without its weights."""
        config = self.config.model_copy(update={"tune": self.source.tuning})
        return make_step(config, self.source.config, make_mesh(config.mesh))

    def fits(self) -> str:
        """That the model is there, and fits the method, the mesh and the batch."""
        step, size = self._whole_step, self.config.train.batch_size
        devices = f"{step.mesh.size} x {step.mesh.devices.flat[0].device_kind}"
        return f"{count(step.assembled.params):,} parameters and {size:,} rows a step, on {devices}"

    def room(self) -> str:
        """What the checkpoints need at once, and what is free."""
        try:
            step = self._whole_step
        except UserError as problem:
            raise NotHere("the model and the mesh have to be right first") from problem
        keep = self.config.checkpoint.keep
        place = existing(Path(self.config.train.output_dir))
        need, free = (keep + 1) * state_bytes(step.program.state), shutil.disk_usage(place).free
        text = f"{keep} checkpoints and one being written take {need / 1e9:.2f} GB; {free / 1e9:.1f} GB are free"
        if need > free:
            raise Problem(f"{text} in {place}")
        return text

    def labels(self) -> str:
        """How much there is to learn from, and that every token has a row in the embedding."""
        try:
            _ = self.source
        except UserError as problem:
            raise NotHere("the model has to be right first") from problem
        data, rows = self.data, tune.vocab_size(self.source.tuning, self.source.config)
        examples, largest = data.train.examples, data.train.examples.largest_token
        if largest >= rows:
            raise Problem(f"the data has the token {largest}, and the model's embedding {rows} rows")
        share = examples.num_supervised / examples.num_tokens
        kind = "packs" if data.train.packing else "rows"
        return (
            f"{len(examples):,} conversations in {data.train.rows:,} {kind}, {share:.0%} of the tokens are learnt, "
            f"{data.train.steps:,} steps; the largest token is {largest} of {rows}"
        )

    def packing(self) -> str:
        """The loss of a few conversations, in one row and in rows of their own."""
        (packed, tokens), (apart, others) = self._losses(packing=True), self._losses(packing=False)
        if tokens != others:
            raise Problem(f"{tokens:.0f} tokens are learnt in packs, and {others:.0f} in rows")
        require_close("the loss in packs", jnp.float32(packed), np.float32(apart), TOLERANCE)
        return f"{packed / tokens:.4f} both ways, over {tokens:.0f} tokens of {len(self._few)} conversations"

    def micro_batches(self) -> str:
        """The step on a few conversations, at once and one after another."""
        batch = self._batch(packing=False)
        wanted, all_at_once = self._step(batch)
        cut = {name: array.reshape(-1, 1, array.shape[-1]) for name, array in batch.items()}
        found, one_by_one = self._step(cut)
        for name in ("loss", "grad_norm"):
            require_close(name, one_by_one[name], all_at_once[name], TOLERANCE)
        leaves = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        for ours, theirs in leaves:
            require_close("a weight after the step", ours, theirs, TOLERANCE)
        return f"{self.config.tune.method}: loss {float(one_by_one['loss']):.4f}, and the same weights after a step"

    def _losses(self, packing: bool) -> tuple[float, float]:
        """The sum of the tokens' losses at the beginning, and how many there are."""
        batch, program = self._batch(packing), self._program
        total, tokens = program.eval_step(program.state["trainable"], program.frozen, program.put(batch))
        return float(total), float(tokens)

    def _step(self, batch: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
        """What trains after a step from the beginning, and the step's numbers."""
        program = self._program
        state = jax.tree.map(jnp.copy, program.state)  # the step takes it
        state, metrics = program.train_step(state, program.frozen, program.put(batch), jnp.int32(1))
        return jax.tree.map(np.asarray, state["trainable"]), jax.device_get(metrics)

    @cached_property
    def _program(self) -> Program:
        """Of the configuration's method on a narrow random model of the family, in float32 on one device."""
        section = self.source.tuning.model_copy(update={"adapter": None})
        usual = {"mesh": MeshSection(), "memory": MemorySection(), "precision": PrecisionSection(compute="float32")}
        config = self.config.model_copy(update={**usual, "tune": section, "optim": PLAIN})
        real = self.source.config
        kv_heads = max(HEADS * real.num_kv_heads // real.num_heads, 1)
        sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": MLP, "head_dim": HIDDEN // HEADS}
        model = replace(real, num_heads=HEADS, num_kv_heads=kv_heads, **sizes)
        source, mesh = replace(self.source, config=model, scheme=None), single_device_mesh()
        execution = Execution.of(config, jnp.float32)
        try:
            made = assemble(source, section, mesh, init="random", seed=config.train.seed, execution=execution)
        except AdapterError as problem:
            raise NotHere(f"the method does not fit a model of width {HIDDEN}: {problem}") from problem
        return build(config, made.model, mesh, made.params, made.mask, self.data.train.steps)

    @cached_property
    def _few(self) -> Examples:
        """The ends of the shortest conversations with something to learn."""
        try:
            examples = self.data.train.examples
        except UserError as problem:
            raise NotHere("the data has to be right first") from problem
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for index in np.argsort(examples.lengths, kind="stable"):
            tokens, mask = (array[-LONGEST:].copy() for array in examples.read(index))
            mask[0] = False
            if mask.any():
                parts.append((tokens, mask))
            if len(parts) == EXAMPLES:
                break
        return join(parts)

    def _batch(self, packing: bool) -> dict[str, np.ndarray]:
        """The few in one pack, with empty rows below it, or each in a row: arrays of one micro-batch, of one shape."""
        count, virtual = len(self._few), self.data.train.virtual
        time = int(self._few.lengths.sum()) + count * len(virtual)
        few = Dataset(self._few, time=time, batch_size=count, packing=packing, shuffle=False, virtual=virtual)
        return few.batch(1).arrays()
