"""The device mesh, and the one table from logical axes to mesh axes.

A form of parallelism is a row of this table, not a class: weights and activations name their logical axes, and this
file alone says where those lie. What moves between devices inside a model is parallel/'s business.
"""

import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtune.config import AXES, MeshSection
from jaxtune.errors import MeshError
from jaxtune.leaves import Axes, Axis
from jaxtune.models.config import ModelConfig
from jaxtune.models.weights import Tree, map_tree
from jaxtune.parallel.local import ROWS

Rules = dict[str, tuple[str, ...]]

RULES: Rules = {
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp",),
    "layers": ("pipe",),
    "norm": (),
    "rank": (),
}
# From which level of `zero` on the row "embed" holds; below it, the array is whole along fsdp.
ZERO = {"moments": 1, "grads": 2, "params": 3}
BATCH = PartitionSpec(None, ROWS, "context")  # micro-batches, rows, time
PRETENDED = "XLA_FLAGS=--xla_force_host_platform_device_count=N gives N on a CPU"
LARGE = 1 << 20  # bytes of a weight that must not end up whole on every device when a sharding was asked for


def make_mesh(section: MeshSection, devices: list | None = None) -> Mesh:
    """The mesh over all devices, with -1 filled in.

    Raises:
        MeshError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = section.sizes
    fixed = math.prod(size for size in sizes.values() if size > 0)
    asked = ", ".join(f"{name}: {size}" for name, size in sizes.items() if size != 1)
    if -1 in sizes.values():
        if len(devices) % fixed:
            raise MeshError(f"mesh {{{asked}}}: {len(devices)} devices are not divisible by {fixed}; {PRETENDED}")
        sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
    elif fixed != len(devices):
        raise MeshError(
            f"mesh {{{asked}}}: needs {fixed} devices, found {len(devices)}; "
            f"set one axis to -1 to take what is there; {PRETENDED}"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def complete(mesh: Mesh) -> Mesh:
    """A mesh with all of our axes, in our order, from one that has some of them.

    Raises:
        MeshError: it has an axis that we do not know.
    """
    unknown = [axis for axis in mesh.axis_names if axis not in AXES]
    if unknown:
        raise MeshError(f"mesh: unknown axis {', '.join(map(str, unknown))}; allowed are {', '.join(AXES)}")
    named = [axis for axis in AXES if axis in mesh.axis_names]
    devices = np.transpose(mesh.devices, [mesh.axis_names.index(axis) for axis in named])
    shape = [mesh.shape.get(axis, 1) for axis in AXES]
    return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def single_device_mesh() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(MeshSection(), jax.devices()[:1])


def batch_shards(mesh: Mesh) -> int:
    """Over how many parts the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_model(mesh: Mesh, config: ModelConfig) -> None:
    """Refuse a mesh that does not divide the model, with the numbers.

    KV heads may be fewer than the tensor axis: then each device holds all of k_proj and v_proj, and takes the heads
    that its query heads use.
    """
    for name, axis, size in (
        ("num_attention_heads", "tensor", config.num_heads),
        ("intermediate_size", "tensor", config.intermediate_size),
        ("vocab_size", "tensor", config.vocab_size),
        ("hidden_size", "fsdp", config.hidden_size),
    ):
        if size % mesh.shape[axis]:
            allowed = [n for n in range(1, mesh.size + 1) if mesh.size % n == 0 and size % n == 0]
            raise MeshError(
                f"mesh.{axis} = {mesh.shape[axis]} does not divide the model's {name} {size}; "
                f"of {mesh.size} devices it may take {', '.join(map(str, allowed))}"
            )


def check_batch(mesh: Mesh, batch_size: int, micro_batches: int) -> None:
    """Refuse a batch that does not split into equal micro-batches on equal device shares."""
    if batch_size % micro_batches:
        raise MeshError(f"train.batch_size {batch_size} is not divisible by train.micro_batches {micro_batches}")
    rows, shards = batch_size // micro_batches, batch_shards(mesh)
    if rows % shards:
        raise MeshError(
            f"train.batch_size {batch_size} in {micro_batches} micro-batches gives {rows} rows, which mesh.data x "
            f"mesh.fsdp = {shards} devices cannot share equally; a multiple of {shards * micro_batches} works"
        )


def check_time(mesh: Mesh, section: MeshSection, time: int) -> None:
    """Refuse sequences that the context and tensor axes cannot share equally."""
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    parts = (2 * context if context > 1 else 1) * (tensor if section.sequence_parallel else 1)
    if time % parts:
        raise MeshError(
            f"sequences of {time} tokens cannot be split for mesh.context {context}"
            + (f" and sequence_parallel over mesh.tensor {tensor}" if section.sequence_parallel else "")
            + f": the length must be divisible by {parts}; set data.max_length to {-(-time // parts) * parts}"
        )


def rules_of(mesh: Mesh, config: ModelConfig, zero: int = 3, kind: str = "params") -> Rules:
    """RULES for one kind of array (params, grads or moments) of this model on this mesh.

    KV heads are whole on every device where the tensor axis does not divide them.
    """
    changes: Rules = {}
    if config.num_kv_heads % mesh.shape["tensor"]:
        changes["kv_heads"] = ()
    if zero < ZERO[kind]:
        changes["embed"] = ()
    return {**RULES, **changes}


def spec(axes: Axes, rules: Rules) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axes."""
    return PartitionSpec(*(_mesh_axes(axis, rules) or None for axis in axes))


def _mesh_axes(axis: Axis, rules: Rules) -> tuple[str, ...]:
    if isinstance(axis, tuple):
        return tuple(name for one in axis for name in _mesh_axes(one, rules))
    return rules[axis] if axis else ()


def shards_of(partition: PartitionSpec, sizes: Mapping[str, int], ndim: int) -> list[int]:
    """Into how many parts each dimension of an array is split. sizes: of the mesh's axes."""
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in partition]
    return [math.prod(sizes[axis] for axis in axes) for axes in entries] + [1] * (ndim - len(entries))


def shardings(mesh: Mesh, config: ModelConfig, weights: Tree, zero: int = 3, memory_kind: str | None = None) -> Tree:
    """The sharding of every declared weight."""
    place = axes_sharding(mesh, config, zero, memory_kind)
    return map_tree(lambda weight: place(weight.full_shape, weight.full_axes), weights)


def axes_sharding(
    mesh: Mesh, config: ModelConfig, zero: int = 3, memory_kind: str | None = None
) -> Callable[[tuple[int, ...], Axes], NamedSharding]:
    """A function (shape, logical axes) -> sharding, for arrays that a tuning method adds.

    With a pipeline, arrays are made in the order of layers and then brought into that of stages (parallel/stages.py):
    until then their layers are whole, and another dimension is split over pipe.
    """
    usual = rules_of(mesh, config, zero)
    spread = {**usual, "layers": (), "embed": ("pipe", *usual["embed"])}

    def home(axes: Axes, rules: Rules) -> NamedSharding:
        return NamedSharding(mesh, spec(axes, rules), memory_kind=memory_kind)

    def place(shape: tuple[int, ...], axes: Axes) -> NamedSharding:
        if mesh.shape["pipe"] == 1:
            return home(axes, usual)
        wide = home(axes, spread)
        fits = not any(
            size % shards for size, shards in zip(shape, shards_of(wide.spec, mesh.shape, len(shape)), strict=True)
        )
        return wide if fits else home(axes, {**usual, "layers": ()})

    return place
