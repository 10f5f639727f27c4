"""Collectives of compiled programs: bytes, counts and axes, against what the program was written to send."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxtune.plan.hlo import Collective, axes_of, collectives, parse, replica_groups

P = PartitionSpec
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
LOCAL = 8 * 4 * 4  # bytes of one device's [8, 4] float32


def compiled_text(function):
    """The HLO of `function` on each device's own shard [8, 4], 8 devices."""
    spec = P("data", "fsdp")
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 3)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(mapped).lower(x).compile().as_text()


def sent(function):
    return collectives(compiled_text(function), MESH)


def psum(axes):
    return lambda x: jax.lax.psum(x, axes)


@pytest.mark.parametrize(
    ("axes", "devices"), [(("tensor",), 2), (("data", "tensor"), 4), (("data", "fsdp", "tensor"), 8)]
)
def test_an_all_reduce_names_its_axes_and_its_bytes(axes, devices):
    assert sent(psum(axes)) == [Collective("all-reduce", "f32", LOCAL, devices, axes, 1)]


def test_an_all_gather_counts_its_whole_result():
    gathered = sent(lambda x: jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)[:8])
    assert gathered == [Collective("all-gather", "f32", 2 * LOCAL, 2, ("fsdp",), 1)]


def test_a_reduce_scatter_counts_its_whole_operand():
    def function(x):
        part = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
        return jnp.concatenate([part, part])

    assert sent(function) == [Collective("reduce-scatter", "f32", LOCAL, 2, ("fsdp",), 1)]


def test_an_all_to_all_counts_its_operand():
    def function(x):
        return jax.lax.all_to_all(x, "tensor", 0, 1, tiled=True).reshape(x.shape)

    assert sent(function) == [Collective("all-to-all", "f32", LOCAL, 2, ("tensor",), 1)]


def test_a_permutation_names_the_axis_along_which_it_goes():
    def function(x):
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    assert sent(function) == [Collective("collective-permute", "f32", LOCAL, 2, ("data",), 1)]


def test_a_scan_multiplies_and_a_scan_in_a_scan_twice():
    def inner(x, _):
        return jax.lax.psum(x, "tensor") * 0.5, None

    def outer(x, _):
        x = jax.lax.psum(x, "data") * 0.5
        return jax.lax.scan(inner, x, None, length=3)[0], None

    found = {one.axes: one for one in sent(lambda x: jax.lax.scan(outer, x, None, length=5)[0])}
    assert found["data",].times == 5 and not found["data",].at_most
    assert found["tensor",].times == 15 and found["tensor",].bytes == LOCAL


def test_a_loop_whose_length_the_data_decide_is_marked():
    def function(x):
        return jax.lax.fori_loop(0, x[0, 0].astype(int), lambda i, x: jax.lax.psum(x, "tensor") * 0.5, x)

    text = compiled_text(function)
    (once,), (often,) = collectives(text, MESH), collectives(text, MESH, loop_trips=7)
    assert once.at_most and once.times == 1
    assert often.times == 7


def test_a_condition_is_marked():
    def function(x):
        return jax.lax.cond(x[0, 0] > 0, psum("tensor"), lambda x: x, x)

    text = compiled_text(lambda x: jax.lax.scan(lambda x, _: (function(x), None), x, None, length=8)[0])
    (one,), (shared,) = collectives(text, MESH), collectives(text, MESH, shares=(0.25,))
    assert one.at_most and one.times == 8
    assert not shared.at_most and shared.times == 2


def test_of_a_condition_the_branch_that_sends_most_is_counted():
    def part(length):
        return lambda x: jnp.pad(jax.lax.psum(x[:length], "tensor"), ((0, 8 - length), (0, 0)))

    def function(x):
        return jax.lax.switch(x[0, 0].astype(int), [part(2), part(8), part(4)], x)

    assert sent(function) == [Collective("all-reduce", "f32", LOCAL, 2, ("tensor",), 1, at_most=True)]


def test_what_a_device_sends_is_that_of_the_ring_algorithms():
    one = Collective("all-reduce", "f32", 1000, 4, ("fsdp",), 2)
    assert one.sent == 2 * 2 * 750
    assert Collective("all-gather", "f32", 1000, 4, ("fsdp",), 1).sent == 750
    assert Collective("collective-permute", "f32", 1000, 4, ("pipe",), 3).sent == 3000


def test_a_tuple_is_one_transfer_of_all_its_parts():
    def function(x):
        return sum(jax.lax.psum((x, x[:4].repeat(2, axis=0) * 3), "tensor"))

    assert sum(one.bytes * one.times for one in sent(function)) == 2 * LOCAL


def test_nothing_is_sent_within_groups_of_one():
    text = "ENTRY %main (p: f32[4]) -> f32[4] {\n  %x = f32[4]{0} all-reduce(%p), replica_groups={{0},{1}}\n}\n"
    assert collectives(text, {"data": 2}) == []


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2), x", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, x", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([4]) {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}, x", [[0, 3], [1, 2]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
    ],
)
def test_groups_are_read_in_every_form(text, groups):
    assert replica_groups(text, 4) == groups


def test_groups_in_a_form_that_is_not_known_are_no_guess():
    with pytest.raises(ValueError, match="not known"):
        replica_groups("replica_groups=mesh_of_meshes[2], x", 4)


def test_groups_that_no_set_of_axes_gives_have_none():
    assert axes_of([[0, 3], [1, 2]], {"data": 2, "fsdp": 2}) == ()
    assert axes_of([[0, 1], [2, 3]], {"data": 1, "fsdp": 2, "tensor": 2}) == ("tensor",)


ASYNC = """
%wrapped (p: bf16[8]) -> bf16[4] {
  %p = bf16[8]{0} parameter(0)
  ROOT %rs = bf16[4]{0:T(8,128)(2,1)S(1)} reduce-scatter(%p), replica_groups=[2,2]<=[4], dimensions={0}, to_apply=%add
}

ENTRY %main (p: bf16[8]) -> bf16[8] {
  %p = bf16[8]{0} parameter(0)
  %a = (bf16[8]{0:T(1024)}, bf16[16]{0:T(1024)S(1)}) all-gather-start(%p), replica_groups=GATHER, dimensions={0}
  %b = bf16[16]{0} all-gather-done(%a)
  %c = (bf16[8]{0}, bf16[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), PAIRS
  %d = bf16[8]{0} collective-permute-done(%c)
  %e = ((bf16[8]{0}), bf16[4]{0}) async-start(%p), calls=%wrapped
  ROOT %f = bf16[8]{0} copy(%d)
}
""".replace("GATHER", "[2,2]<=[2,2]T(1,0)").replace("PAIRS", "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}")


def test_asynchronous_forms_count_once_and_their_operands_not():
    found = {one.kind: one for one in collectives(ASYNC, {"data": 2, "tensor": 2})}
    assert found["all-gather"] == Collective("all-gather", "bf16", 32, 2, ("data",), 1)
    assert found["collective-permute"] == Collective("collective-permute", "bf16", 16, 2, ("tensor",), 1)
    assert found["reduce-scatter"] == Collective("reduce-scatter", "bf16", 16, 2, ("tensor",), 1)


def test_a_loop_without_a_known_count_is_read_off_its_condition():
    """XLA for TPU does not write the count down."""
    text = compiled_text(lambda x: jax.lax.scan(lambda x, _: (psum("tensor")(x) / 2, None), x, None, length=6)[0])
    silent = text.replace("known_trip_count", "unheard")
    assert text != silent
    assert collectives(silent, MESH) == collectives(text, MESH)
    assert collectives(silent, MESH)[0].times == 6
    taken = re.findall(r"^  %(\S+) = \S+ get-tuple-element\(%(\S+)\), index=(\d+)", silent, re.MULTILINE)
    for name, whole, index in taken:  # as jax 0.11 writes it
        silent = re.sub(rf"%{re.escape(name)}(?=[,)])", f"%{whole}#{index}", silent)
    assert "#0" in silent and collectives(silent, MESH) == collectives(text, MESH)


def test_every_computation_is_parsed():
    text = compiled_text(partial(psum("tensor")))
    computations, entry = parse(text)
    assert entry in computations and all(computations.values())
