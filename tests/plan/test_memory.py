"""Bytes of trees from shapes and shardings, and of a compiled program, against what the arrays take."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.config import MeshSection
from jaxtune.mesh import make_mesh
from jaxtune.plan.memory import Compiled, tree_bytes

P = PartitionSpec


def array(mesh, shape, spec, dtype=jnp.float32, **kind):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec, **kind))


def test_a_tree_takes_what_one_device_holds_of_it():
    mesh = make_mesh(MeshSection(data=2, fsdp=4))
    tree = {"whole": array(mesh, (8, 4), P()), "parts": array(mesh, (8, 4), P(("data", "fsdp")), jnp.bfloat16)}
    assert tree_bytes(tree) == {"device": 8 * 4 * 4 + 4 * 2}
    assert tree_bytes(tree)["device"] == sum(
        jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding).addressable_shards[0].data.nbytes for x in tree.values()
    )


def test_offloaded_arrays_count_apart():
    mesh = make_mesh(MeshSection(fsdp=8))
    tree = [array(mesh, (8, 4), P("fsdp"), memory_kind="pinned_host"), array(mesh, (8, 4), P("fsdp"))]
    assert tree_bytes(tree) == {"pinned_host": 16, "device": 16}


def test_a_compiled_program_says_what_it_needs():
    mesh = make_mesh(MeshSection(fsdp=8))
    x = array(mesh, (800, 100), P("fsdp"))
    compiled = jax.jit(lambda x: x @ (x.T @ x), donate_argnums=0, out_shardings=x.sharding).lower(x).compile()
    found = Compiled.of(compiled)
    assert found.arguments == found.outputs == found.aliased == 100 * 100 * 4
    assert found.peak == found.arguments + found.temporaries
    assert found.temporaries >= 100 * 100 * 4
