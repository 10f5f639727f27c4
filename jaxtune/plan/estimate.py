"""A step's memory and time by arithmetic alone: what orders a search's candidates, not what a plan reports.

Bytes of weights, gradients and moments follow from shapes and are exact, but for a pipeline's empty places.
Activations and seconds are rough: a search compiles the best few, and learns from them how far off the rest are.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtune.config import Config
from jaxtune.loss import chunk_of
from jaxtune.models.config import ModelConfig
from jaxtune.models.execution import Execution
from jaxtune.number_types import compute_dtype
from jaxtune.parallel.layout import Layout
from jaxtune.parallel.schedule import make_schedule
from jaxtune.plan.program import Step
from jaxtune.plan.target import Chip

HOST_LINK = 25e9  # bytes a second between a device and its host: PCIe 4 x16, rounded down
USED = 0.5  # of the chip's peak, by the matmuls of a large model
Sizes = dict[str, int]  # of the mesh's axes


@dataclass(frozen=True)
class Estimate:
    """Of one device: bytes held between steps, bytes that come and go within one, and seconds of a step."""

    held: float
    temporaries: float
    compute: float
    network: float
    host: float  # to and from the host's memory

    @property
    def seconds(self) -> float:
        return self.compute + self.network + self.host

    def peak(self, correction: float = 1.0) -> float:
        return self.held + correction * self.temporaries


@dataclass(frozen=True)
class Held:
    """Of one device: numbers of what trains, of all weights, of gradients and of moments; bytes of all weights."""

    trained: float
    weights: float
    grads: float
    moments: float
    bytes: float


@dataclass(frozen=True)
class Facts:
    """What does not depend on memory settings or micro-batches."""

    step: Step  # on one device
    _held: dict = field(default_factory=dict, repr=False)

    @property
    def model(self) -> ModelConfig:
        return self.step.assembled.model.config

    @property
    def compute_bytes(self) -> int:
        """Of an activation."""
        return jnp.dtype(compute_dtype(self.step.config.precision.compute)).itemsize

    @property
    def moment_bytes(self) -> float:
        """Of the optimiser's state for each trained number."""
        state = self.step.program.state
        count = sum(x.size for x in jax.tree.leaves(state["trainable"]))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state["optimizer"])) / count

    def held(self, sizes: Sizes, zero: int) -> Held:
        """What a device would hold on a mesh of these sizes."""
        key = (*sizes.values(), zero)
        if key not in self._held:
            self._held[key] = self._count(sizes, zero)
        return self._held[key]

    def _count(self, sizes: Sizes, zero: int) -> Held:
        model, program = self.step.assembled.model, self.step.program
        mesh: Any = SimpleNamespace(shape=sizes, axis_names=tuple(sizes))
        trainable, frozen = program.state["trainable"], program.frozen
        layout = Layout.of(mesh, model.config, model.weights, trainable, frozen, zero)
        trained, trained_bytes = parts_of(trainable, layout.trainable, sizes)
        rest, rest_bytes = parts_of(frozen, layout.frozen, sizes)
        grads, moments = (parts_of(trainable, specs, sizes)[0] for specs in (layout.grads, layout.moments))
        return Held(trained, trained + rest, grads, moments, trained_bytes + rest_bytes)


def parts_of(tree: Any, specs: Any, sizes: Sizes) -> tuple[float, float]:
    """(numbers, bytes) that one device has of a tree."""
    numbers = bytes_ = 0.0
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    for array, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
        axes = [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
        share = array.size / math.prod(sizes[axis] for axis in axes)
        numbers, bytes_ = numbers + share, bytes_ + share * array.dtype.itemsize
    return numbers, bytes_


@dataclass(frozen=True)
class Shares:
    """What one device has of a step: elements of a token's row in one layer, and tokens of a micro-batch."""

    config: Config
    sizes: Sizes
    model: ModelConfig

    @property
    def tokens(self) -> float:
        train, split = self.config.train, self.sizes["data"] * self.sizes["fsdp"] * self.sizes["context"]
        return train.batch_size * self.config.data.max_length / (train.micro_batches * split)

    @property
    def layers(self) -> int:
        """Of the stage that has most."""
        return -(-self.model.num_layers // self.sizes["pipe"])

    @property
    def widths(self) -> dict[str, float]:
        """Elements for each token of what remat can name."""
        model, tensor = self.model, self.sizes["tensor"]
        stream = model.hidden_size / (tensor if self.config.mesh.sequence_parallel else 1)
        query = model.num_heads * model.head_dim / tensor
        key = max(model.num_kv_heads, tensor) * model.head_dim / tensor
        wide = model.intermediate_size / tensor
        names = {"query": query, "key": key, "value": key, "attended": query, "gate": wide, "up": wide}
        return {**names, "after_attention": stream, "down": stream, "stream": stream}

    @property
    def scores(self) -> float:
        """Elements for each token of a layer's attention scores; the mask hides half of a row."""
        return self.model.num_heads / self.sizes["tensor"] * self.config.data.max_length / 2

    @property
    def whole_layer(self) -> float:
        """Elements for each token of all that a layer computes."""
        w = self.widths
        return 6 * w["stream"] + 2 * self.model.hidden_size + 3 * w["query"] + 4 * w["key"] + 4 * w["gate"]

    @property
    def kept(self) -> float:
        """Elements for each token that a layer keeps for its backward pass."""
        remat, w = self.config.memory.remat, self.widths
        if remat == "none":
            return self.whole_layer + 3 * self.scores
        if remat == "dots":
            return w["stream"] * 3 + w["query"] + 2 * w["key"] + 2 * w["gate"]
        if remat == "full":
            groups = Execution(remat="full").groups(self.layers)
            return w["stream"] * (groups + self.layers / groups) / self.layers
        names = () if remat == "block" else remat
        on_host = "activations" in self.config.memory.offload
        return w["stream"] + (0.0 if on_host else sum(w[name] for name in names))

    @property
    def recomputed(self) -> float:
        """The share of a forward pass's matmuls that the backward pass does again."""
        remat, pipeline = self.config.memory.remat, float(self.sizes["pipe"] > 1)
        if remat in ("block", "full"):
            return 1.0 + (remat == "full") + pipeline
        if isinstance(remat, str):
            return pipeline
        w = self.widths
        again = {name: w[name] for name in ("query", "key", "value", "gate", "up") if name not in remat}
        return pipeline + sum(again.values()) / (2 * w["query"] + 2 * w["key"] + 3 * w["gate"])


def estimate(facts: Facts, config: Config, sizes: Sizes, chip: Chip) -> Estimate:
    """Of a configuration whose mesh has these sizes."""
    shares, held = Shares(config, sizes, facts.model), facts.held(sizes, config.mesh.zero)
    offload, micro = config.memory.offload, config.train.micro_batches
    moments = held.moments * facts.moment_bytes
    resident = held.bytes * ("params" not in offload) + moments * ("optimizer" not in offload)
    grads = held.grads * _sum_bytes(facts, config)
    cast = held.weights * facts.compute_bytes * (facts.compute_bytes < held.bytes / held.weights)
    backward = grads * _sums(shares) + cast + _activations(facts, shares) + _working(facts, shares)
    streamed = (moments * ("optimizer" in offload) + held.bytes * ("params" in offload)) / facts.model.num_layers
    temporaries = max(backward, grads + streamed)  # the update of what lies on the host goes layer by layer
    away = 2 * moments * ("optimizer" in offload) + 3 * micro * held.bytes * ("params" in offload)
    if "activations" in offload:
        named = sum(shares.widths[name] for name in config.memory.remat)
        away += 2 * micro * shares.tokens * shares.layers * named * facts.compute_bytes
    network = sum(sent / chip.bandwidth(span_of(axis, sizes)) for axis, sent in _sent(facts, shares, held).items())
    return Estimate(resident, temporaries, _compute(facts, shares, chip), network, away / HOST_LINK)


def _sums(shares: Shares) -> float:
    """How many times the gradients are there at once: summed up, and of the micro-batch or chunk at work."""
    if shares.sizes["pipe"] > 1:
        return 1 + 1 / shares.config.mesh.virtual_stages
    return 1.0 + (shares.config.train.micro_batches > 1)


def span_of(axis: str, sizes: Sizes) -> int:
    """Among how many neighbours the devices of a group along an axis lie."""
    axes = list(sizes)
    return math.prod(sizes[inner] for inner in axes[axes.index(axis) :])


def _compute(facts: Facts, shares: Shares, chip: Chip) -> float:
    """Seconds of matmuls, the pipeline's idle ticks with them."""
    work = shares.config.train.micro_batches * shares.config.mesh.virtual_stages
    stretched = (work + shares.sizes["pipe"] - 1) / work
    flops = facts.step.model_flops / math.prod(shares.sizes.values()) * (1 + shares.recomputed / 3)
    return flops * stretched / (chip.flops * USED)


def _sum_bytes(facts: Facts, config: Config) -> int:
    return facts.compute_bytes if config.memory.gradients == "compute" else 4


def _activations(facts: Facts, shares: Shares) -> float:
    """Bytes that wait for the backward pass."""
    each, mesh = shares.tokens * facts.compute_bytes, shares.config.mesh
    of_stage = shares.kept * shares.layers * each
    if (stages := shares.sizes["pipe"]) == 1:
        return of_stage
    buffers = _buffers(mesh.schedule, stages, shares.config.train.micro_batches, mesh.virtual_stages)
    return of_stage / mesh.virtual_stages + buffers * shares.widths["stream"] * each


def _working(facts: Facts, shares: Shares) -> float:
    """Bytes of the layer at work, twice for values and their gradients, and of the loss."""
    model, each, tensor = facts.model, facts.compute_bytes, shares.sizes["tensor"]
    block = 3 * shares.scores / 4 * 4 / each  # float32, of a quarter of the queries at once
    layer = 2 * shares.tokens * (shares.whole_layer + block) * each
    gathered = 3 * model.layer_weights / tensor * each * (shares.config.mesh.zero == 3)
    head = model.vocab_size * model.hidden_size / tensor * (each + 4)
    vocab = model.vocab_size // tensor
    loss = 3 * chunk_of(vocab) * vocab * 4 + 3 * shares.tokens * model.hidden_size * each
    return layer + gathered + head + loss


def _sent(facts: Facts, shares: Shares, held: Held) -> dict[str, float]:
    """Bytes that a device sends in a step along each axis."""
    config, sizes, each = shares.config, shares.sizes, facts.compute_bytes
    micro, sums, zero = config.train.micro_batches, _sum_bytes(facts, config), config.mesh.zero
    stream = shares.tokens * facts.model.hidden_size * each * shares.layers * micro
    passes = 2 + (sizes["pipe"] > 1)
    rounds = micro if zero == 2 else 2  # scattered after each micro-batch, or summed at the end
    split = micro * (sizes["fsdp"] - 1) * (passes * held.weights * each + held.trained * sums)
    whole = _ring(sizes["fsdp"]) * held.trained * (rounds * sums + 4 * (zero > 0))
    keys = 2 * shares.widths["key"] / facts.model.hidden_size
    return {
        "data": 2 * _ring(sizes["data"]) * held.grads * sums,
        "fsdp": split if zero == 3 else whole,
        "tensor": (4 + 2 * min(shares.recomputed, 1)) * 2 * _ring(sizes["tensor"]) * stream,
        "context": 4 * (sizes["context"] - 1) * keys * stream,
        "pipe": 2 * (sizes["pipe"] > 1) * stream / shares.layers,
    }


def _ring(devices: int) -> float:
    return (devices - 1) / devices


@lru_cache
def _buffers(name: str, stages: int, micro_batches: int, virtual: int) -> int:
    """Stage inputs and gradients that a stage keeps, with the two that it makes and the two that arrive."""
    schedule = make_schedule(name, stages, micro_batches, virtual)
    return schedule.num_slots + schedule.num_grad_slots + 4
