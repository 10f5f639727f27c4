"""The device mesh, and the one table from logical axes to mesh axes.

A form of parallelism is a row of `RULES`, not a class: weights and activations name their logical axes,
and this file alone says where those lie.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtune.config import MeshSection
from jaxtune.errors import MeshError
from jaxtune.leaves import LowRank
from jaxtune.models.config import ModelConfig
from jaxtune.models.weights import Tree, Weight, map_tree

Axes = tuple[str | None, ...]

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    # weights and activations
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    # weights alone: gathered layer by layer, just before use
    "embed": ("fsdp",),
    # replicated
    "layers": (),
    "norm": (),
    "rank": (),
}
LARGE = 1 << 20  # bytes of a weight that must not end up whole on every device when a sharding was asked for


def make_mesh(section: MeshSection, devices: list | None = None) -> Mesh:
    """The mesh over all devices, with -1 filled in.

    Raises:
        MeshError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = section.model_dump()
    fixed = math.prod(size for size in sizes.values() if size > 0)
    asked = ", ".join(f"{name}: {size}" for name, size in sizes.items())
    if -1 in sizes.values():
        if len(devices) % fixed:
            raise MeshError(f"mesh {{{asked}}}: {len(devices)} devices are not divisible by {fixed}")
        sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
    elif fixed != len(devices):
        raise MeshError(
            f"mesh {{{asked}}}: needs {fixed} devices, found {len(devices)}; "
            "set one axis to -1 to take what is there; XLA_FLAGS=--xla_force_host_platform_device_count=N gives N"
        )
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def single_device_mesh() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(MeshSection(), jax.devices()[:1])


def batch_shards(mesh: Mesh) -> int:
    """Over how many parts the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def check_model(mesh: Mesh, config: ModelConfig) -> None:
    """Refuse a mesh that does not divide the model, with the numbers.

    KV heads may be fewer than the tensor axis: then each device holds all of k_proj and v_proj, and computes
    the heads that its query heads use.
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


def spec(axes: Axes, rules: dict[str, tuple[str, ...]] = RULES) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axes."""
    return PartitionSpec(*((rules[axis] or None) if axis else None for axis in axes))


def weight_rules(mesh: Mesh | AbstractMesh, config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """RULES, with KV heads replicated where the tensor axis does not divide them."""
    if config.num_kv_heads % mesh.shape["tensor"]:
        return {**RULES, "kv_heads": ()}
    return RULES


def shardings(mesh: Mesh, config: ModelConfig, weights: Tree) -> Tree:
    """The sharding of every declared weight."""
    rules = weight_rules(mesh, config)
    return map_tree(lambda weight: NamedSharding(mesh, spec(weight.full_axes, rules)), weights)


def axes_sharding(mesh: Mesh, config: ModelConfig) -> Callable[[tuple[int, ...], Axes], NamedSharding]:
    """A function (shape, logical axes) -> sharding, for arrays that a tuning method adds."""
    rules = weight_rules(mesh, config)
    return lambda shape, axes: NamedSharding(mesh, spec(axes, rules))


def check_sharded(params: Tree, expected: Tree) -> None:
    """A large parameter that is whole on every device, though its declaration splits it, is an error."""

    def check(path, array, sharding):
        whole = array.sharding.is_fully_replicated and not sharding.is_fully_replicated
        if whole and array.nbytes > LARGE:
            raise MeshError(f"{jax.tree_util.keystr(path)} {array.shape} is whole on each device, not {sharding.spec}")

    jax.tree_util.tree_map_with_path(check, params, expected)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's logical axes to the mesh in force; without one, nothing happens."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(axes))


def tensor_size() -> int:
    """Size of the tensor axis in force."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def gather(leaf: Any, weight: Weight, config: ModelConfig) -> Any:
    """A weight as it is used, of one layer where it is of a stack: whole along fsdp, still split along tensor.

    Without this the compiler may move activations to the weights in place of weights to the activations.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return leaf
    rules = {**weight_rules(mesh, config), "embed": ()}
    if isinstance(leaf, LowRank):
        out_axis, in_axis = weight.axes
        a = jax.lax.with_sharding_constraint(leaf.a, spec((in_axis, "rank"), rules))
        b = jax.lax.with_sharding_constraint(leaf.b, spec(("rank", out_axis), rules))
        return replace(leaf, base=gather(leaf.base, weight, config), a=a, b=b)
    return jax.lax.with_sharding_constraint(leaf, spec(weight.axes, rules))
