"""What was compiled: the collectives that define each form of parallelism, and the bytes that each option saves."""

import dataclasses
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config import make_config
from jaxtune.mesh import single_device_mesh
from jaxtune.models.execution import Execution, worth_unrolling
from jaxtune.parallel.schedule import bubble, make_schedule
from jaxtune.plan.hlo import collectives
from jaxtune.plan.memory import tree_bytes
from jaxtune.step import make_gradients
from tests.programs import CONFIG, FULL, HIDDEN, LAYERS, ROWS, TIME, VOCAB, Stepper

DEVICES = 8
DEEP = dataclasses.replace(CONFIG, num_layers=25)
KINDS = r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@cache
def zero(level):
    return Stepper(mesh={"fsdp": DEVICES, "zero": level})


def arrays_moved(stepper, kind):
    """The shapes of what a kind of collective gives, scalars left out."""
    found = re.findall(rf"= (\(.*?\)|\S+) ({KINDS})\(", stepper.hlo)
    return {shape for result, name in found if name == kind for shape in re.findall(r"\[([\d,]+)\]", result)}


def matrices(*shapes):
    return {",".join(map(str, shape)) for shape in shapes}


def held(stepper, name):
    """Bytes on one device of a part of the compiled step's arguments."""
    homes = stepper.compiled.input_shardings[0][0][name]
    pairs = zip(jax.tree.leaves(stepper.state[name]), jax.tree.leaves(homes), strict=True)
    return sum(x.dtype.itemsize * int(np.prod(home.shard_shape(x.shape))) for x, home in pairs)


def times(stepper, kind):
    """bytes of a buffer -> how often the compiled step runs collectives of this kind with such a buffer."""
    count = Counter()
    for one in collectives(stepper.hlo, dict(stepper.mesh.shape)):
        if one.kind == kind:
            count[one.bytes] += one.times
    return count


def gradients_of(stepper, dtype=np.float32):
    """(jitted function, arguments) of the gradients that leave the region."""
    program = stepper.program
    function = jax.jit(make_gradients(stepper.model, program.layout, dtype, 0))
    return function, (stepper.state["trainable"], program.frozen, stepper.batch(1), np.int32(1), np.float32(1), {})


def gradient_bytes(stepper):
    """Bytes on one device of the gradients that leave the compiled region."""
    function, arguments = gradients_of(stepper)
    return function.lower(*arguments).compile().memory_analysis().output_size_in_bytes


def test_zero_levels_hold_an_eighth_of_optimiser_then_gradients_then_weights():
    whole = {"trainable": held(zero(0), "trainable"), "optimizer": held(zero(0), "optimizer")}
    grads = [gradient_bytes(zero(level)) for level in range(4)]
    assert grads[0] == pytest.approx(whole["trainable"], rel=1e-3)
    for level in range(4):
        # Norms and biases, which have no axis to split, are a small rest.
        def share(count, of, is_split):
            assert count / of == pytest.approx(1 / DEVICES if is_split else 1, abs=0.02)

        share(held(zero(level), "optimizer"), whole["optimizer"], level >= 1)
        share(grads[level], grads[0], level >= 2)
        share(held(zero(level), "trainable"), whole["trainable"], level >= 3)


def test_what_is_split_is_a_half_on_two_devices():
    params, moments = (held(zero(0), name) for name in ("trainable", "optimizer"))
    for level, expected in ((1, params + moments / 2), (3, (params + moments) / 2)):
        stepper = Stepper(mesh={"fsdp": 2, "zero": level})
        batch = tree_bytes(stepper.batch(1))["device"]
        assert stepper.memory.argument_size_in_bytes == pytest.approx(expected + batch, rel=0.01)


def test_zero_0_and_1_reduce_whole_gradients_and_1_gathers_new_weights():
    one_layer, stack = matrices((128, HIDDEN)), matrices((LAYERS, 128, HIDDEN), (VOCAB, HIDDEN))
    for level in (0, 1):
        assert stack <= arrays_moved(zero(level), "all-reduce")
        assert not arrays_moved(zero(level), "reduce-scatter")
    assert not arrays_moved(zero(0), "all-gather")
    assert stack <= arrays_moved(zero(1), "all-gather")
    assert not one_layer & arrays_moved(zero(1), "all-gather")


def test_zero_2_scatters_gradients_and_gathers_new_weights():
    stack = matrices((LAYERS, 128, HIDDEN), (VOCAB, HIDDEN))
    assert matrices((LAYERS, 128, HIDDEN // DEVICES), (VOCAB, HIDDEN // DEVICES)) <= arrays_moved(
        zero(2), "reduce-scatter"
    )
    assert stack <= arrays_moved(zero(2), "all-gather")
    assert not stack & arrays_moved(zero(2), "all-reduce")


def test_zero_2_scatters_after_each_micro_batch_and_keeps_the_parts():
    whole, parts = (Stepper(mesh={"fsdp": DEVICES, "zero": n}, train={"micro_batches": 2}) for n in (1, 2))
    gate = LAYERS * 128 * HIDDEN * 4  # bytes of one of its gradients; the table is as large
    assert times(parts, "reduce-scatter")[gate] == 4 * 2, "gate, up, down and the table, after each micro-batch"
    assert not times(whole, "reduce-scatter")
    gradients = held(zero(0), "trainable")
    assert whole.memory.temp_size_in_bytes - parts.memory.temp_size_in_bytes > 0.7 * gradients


def test_zero_3_gathers_a_layer_at_a_time_and_scatters_its_gradient():
    one_layer = matrices((128, HIDDEN), (HIDDEN, 128))
    assert one_layer <= arrays_moved(zero(3), "all-gather")
    assert matrices((128, HIDDEN // DEVICES)) <= arrays_moved(zero(3), "reduce-scatter")
    assert not any(
        shape.startswith(f"{LAYERS},") for shape in arrays_moved(zero(3), "all-gather") if shape.count(",") == 2
    )
    gate = 128 * HIDDEN * 4  # bytes, of one layer
    assert times(zero(3), "all-gather")[gate] >= 3 * 2 * LAYERS, "gate, up and down, forward and backward"


def test_vocabulary_parallel_loss_gathers_no_logits():
    stepper = Stepper(mesh={"tensor": 8})
    assert not arrays_moved(stepper, "all-gather")
    assert not any(str(VOCAB) in shape.split(",") for shape in arrays_moved(stepper, "all-reduce"))


def test_sequence_parallelism_scatters_and_gathers_the_residual_stream():
    plain, split = (Stepper(mesh={"tensor": 4, "sequence_parallel": flag}) for flag in (False, True))
    stream, part = matrices((16, TIME, HIDDEN)), matrices((16, TIME // 4, HIDDEN))
    assert stream <= arrays_moved(plain, "all-reduce")
    assert not stream & arrays_moved(split, "all-reduce")
    assert stream <= arrays_moved(split, "all-gather")
    assert part <= arrays_moved(split, "reduce-scatter")


@cache
def pipelined(schedule, micro_batches):
    """Two rows in each micro-batch, however many there are."""
    train = {"micro_batches": micro_batches, "batch_size": 2 * micro_batches}
    return Stepper(rows=2 * micro_batches, mesh={"pipe": 4, "schedule": schedule}, train=train, tune=FULL)


def test_memory_of_1f1b_does_not_grow_with_the_micro_batches_and_gpipe_s_does():
    growth = {}
    for name in ("1f1b", "gpipe"):
        few, many = (pipelined(name, count).memory.temp_size_in_bytes for count in (8, 24))
        growth[name] = many - few
    stage_input = 2 * TIME * HIDDEN * 4
    assert growth["1f1b"] < stage_input
    assert growth["gpipe"] > 14 * stage_input


def test_interleaved_has_a_smaller_bubble_at_the_same_micro_batches():
    assert bubble(make_schedule("interleaved", 4, 8, 2)) < 0.75 * bubble(make_schedule("1f1b", 4, 8))


def test_what_is_compiled_has_the_ticks_of_its_schedule():
    """Two sends a tick, one up and one down."""
    for name, virtual in (("1f1b", 1), ("interleaved", 2)):
        mesh = {"pipe": 2, "schedule": name, "virtual_stages": virtual}
        stepper = Stepper(mesh=mesh, train={"micro_batches": 4, "batch_size": ROWS})
        sends = times(stepper, "collective-permute")[ROWS // 4 * TIME * HIDDEN * 4]
        assert sends == 2 * make_schedule(name, 2, 4, virtual).ticks


def test_the_whole_state_is_given_up_to_the_step():
    for level in range(4):
        assert zero(level).memory.alias_size_in_bytes == sum(held(zero(level), name) for name in zero(level).state)


def test_gradients_are_summed_up_in_the_type_that_is_asked_for():
    for kind, expected in (("float32", np.float32), ("compute", jnp.bfloat16)):
        sections = {"memory": {"gradients": kind}, "train": {"micro_batches": 2}}
        stepper = Stepper(mesh={"fsdp": 2, "zero": 2}, precision={"compute": "bfloat16"}, **sections)
        function, arguments = gradients_of(stepper, jnp.bfloat16)
        _, grads, _ = jax.eval_shape(function, *arguments)
        assert {grad.dtype for grad in jax.tree.leaves(grads)} == {jnp.dtype(expected)}


def test_remat_policies_keep_less_in_the_promised_order():
    def kept(remat):
        memory = {} if remat is None else {"memory": {"remat": remat}}
        return Stepper(DEEP, **memory).memory.temp_size_in_bytes

    sizes = [kept(remat) for remat in ("none", "dots", None, "block", "full")]
    none, dots, names, block, full = sizes
    assert none > 1.5 * dots and names > 1.5 * block and block > 1.05 * full, sizes
    assert names < 1.03 * dots, "the names are those of most matmuls' results"


def test_unrolled_layers_are_not_copied_into_stacks_and_out_of_them():
    """A loop puts what each layer keeps into a stack of all layers' and takes it out again."""

    def stacked(unroll):
        hlo = Stepper(memory={"unroll": unroll}).hlo
        return re.findall(rf"= f32\[{LAYERS},\d+,[\d,]+\]\S* dynamic-update-slice\(", hlo)

    assert len(stacked(False)) > 6 and not stacked(True)


@pytest.mark.parametrize(
    ("asked", "found", "expected"), [("auto", True, True), (True, False, True), (False, True, False)]
)
def test_layers_are_unrolled_where_it_is_said_or_found_to_be_worth_it(asked, found, expected):
    config = make_config({"model": {"path": "-"}, "data": {"path": "-"}, "memory": {"unroll": asked}})
    assert Execution.of(config, np.float32, unroll=found).unroll is expected


def test_unrolling_is_worth_it_in_a_long_run_on_one_gpu():
    devices = np.array([SimpleNamespace(platform="gpu")])
    one, two = (SimpleNamespace(size=size, devices=devices) for size in (1, 2))
    qwen = dataclasses.replace(
        CONFIG,
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
    )
    assert qwen.matmul_weights == 493_961_216
    few, many = 3000 * 16384, 3200 * 16384
    tree = {"model": {"path": "-"}, "data": {"path": "-"}}
    usual = make_config(tree)
    assert worth_unrolling(usual, one, qwen, many) and not worth_unrolling(usual, one, qwen, few)
    assert not any(worth_unrolling(usual, mesh, qwen, many) for mesh in (two, single_device_mesh()))
    for memory in ({"remat": "block"}, {"remat": "full"}, {"offload": ["optimizer"]}):
        assert not worth_unrolling(make_config({**tree, "memory": memory}), one, qwen, many)


def test_temporary_memory_falls_with_the_ring_s_size():
    sizes = [Stepper(rows=2, time=512, mesh={"context": n}).memory.temp_size_in_bytes for n in (1, 2, 4, 8)]
    assert all(less < 0.75 * more for more, less in pairwise(sizes)), sizes
