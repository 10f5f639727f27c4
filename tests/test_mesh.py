"""The same numbers on every mesh, with the collectives that each mesh should have and no others."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.config import MeshSection
from jaxtune.errors import MeshError
from jaxtune.leaves import dim_of
from jaxtune.mesh import axes_sharding, check_batch, check_model, make_mesh, rules_of, shards_of, spec
from jaxtune.models.config import ModelConfig
from jaxtune.parallel.layout import check_sharded
from tests.programs import FULL, HIDDEN, LAYERS, LORA, ROWS, TIME, VOCAB, Stepper

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 2, 4)]
OFTEN = {(2, 2, 2), (1, 8, 1)}  # in every run of the suite, which has more meshes in test_parallel_table.py


def mesh_of(data, fsdp, tensor):
    return make_mesh(MeshSection(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


def start(tune, sizes):
    return Stepper(tune=tune, mesh=dict(zip(("data", "fsdp", "tensor"), sizes)), optim={"lr": 1e-3})


@pytest.fixture(scope="module", params=[FULL, LORA], ids=["full", "lora"])
def one_device(request):
    return request.param, start(request.param, (1, 1, 1)).run(10)


@pytest.mark.parametrize(
    "sizes", [pytest.param(sizes, marks=[] if sizes in OFTEN else pytest.mark.thorough) for sizes in MESHES], ids=str
)
def test_ten_losses_equal_one_device_s(one_device, sizes):
    tune, expected = one_device
    np.testing.assert_allclose(start(tune, sizes).run(10), expected, rtol=1e-5)


def collectives(section, sizes):
    """How often each collective stands in the compiled step, scalars left out, and the shapes by collective."""
    text = start(section, sizes).hlo
    found = re.findall(r"= (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", text)
    shapes = {
        kind: [s for result, k in found if k == kind for s in re.findall(r"\[([\d,]+)\]", result)] for _, kind in found
    }
    return {kind: Counter(of_kind) for kind, of_kind in shapes.items() if of_kind}


def test_data_parallel_only_reduces_gradients():
    found = collectives(FULL, (8, 1, 1))
    assert set(found) == {"all-reduce"}
    assert f"{VOCAB},{HIDDEN}" in found["all-reduce"]


def test_data_parallel_lora_reduces_adapters_alone():
    found = collectives(LORA, (8, 1, 1))
    assert set(found) == {"all-reduce"}
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in found["all-reduce"])
    assert largest == LAYERS * 128 * 4  # a or b of the widest matrix


def test_fsdp_gathers_weights_layer_by_layer_and_moves_no_activation():
    found = collectives(FULL, (1, 8, 1))
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = found["all-gather"]
    assert f"128,{HIDDEN}" in gathered and f"{VOCAB},{HIDDEN}" in gathered
    assert f"{LAYERS},128,{HIDDEN}" not in gathered  # one layer at a time
    assert not any(f",{TIME}," in shape for kind in found.values() for shape in kind)


def test_fsdp_shards_parameters_and_optimiser():
    whole, split = (start(FULL, sizes).memory for sizes in ((1, 1, 1), (1, 8, 1)))
    assert split.argument_size_in_bytes < whole.argument_size_in_bytes / 7


def test_tensor_parallel_reduces_activations_and_gathers_no_logits():
    found = collectives(FULL, (1, 1, 8))
    assert f"{ROWS},{TIME},{HIDDEN}" in found["all-reduce"]
    assert not any(str(VOCAB) in shape.split(",")[-1:] for shape in found.get("all-gather", ()))


def test_large_parameter_left_whole_is_an_error():
    mesh = mesh_of(1, 8, 1)
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("fsdp"), PartitionSpec()))
    check_sharded({"w": jax.device_put(jnp.zeros((1024, 1024)), split)}, {"w": split})
    with pytest.raises(MeshError, match=r"w.*is whole on each device"):
        check_sharded({"w": jax.device_put(jnp.zeros((1024, 1024)), whole)}, {"w": split})


def test_optimiser_moments_lie_with_their_weights():
    state = start(FULL, (1, 4, 2)).state
    moments = state["optimizer"][0].mu
    jax.tree.map(lambda p, m: np.testing.assert_equal(p.sharding, m.sharding), state["trainable"], moments)


@pytest.mark.parametrize(
    ("section", "devices", "message"),
    [
        ({"data": 3, "fsdp": -1}, 8, "8 devices are not divisible by 3"),
        ({"data": 2, "fsdp": 2}, 8, "needs 4 devices, found 8"),
        ({"data": 4, "fsdp": 4}, 8, "needs 16 devices, found 8"),
    ],
)
def test_mesh_that_does_not_fit_the_devices_is_refused(section, devices, message):
    with pytest.raises(MeshError, match=message):
        make_mesh(MeshSection(**section), jax.devices()[:devices])


def test_heads_that_the_tensor_axis_does_not_divide_are_refused_with_what_would_fit():
    odd = ModelConfig("llama", VOCAB, 72, 96, 2, 9, 3, 8, 256)
    with pytest.raises(MeshError, match=r"tensor = 2 does not divide the model's num_attention_heads 9.*1"):
        check_model(mesh_of(1, 4, 2), odd)


@pytest.mark.parametrize(("size", "micro"), [(12, 1), (16, 4), (9, 2)])
def test_batch_that_does_not_fit_the_mesh_is_refused(size, micro):
    with pytest.raises(MeshError, match=r"train\.batch_size"):
        check_batch(mesh_of(8, 1, 1), size, micro)


def test_a_dimension_may_lie_along_several_axes():
    mesh = make_mesh(MeshSection(fsdp=4, tensor=2))
    config = ModelConfig("qwen2", VOCAB, HIDDEN, 128, LAYERS, 8, 3, 8, 256)  # 3 KV heads stay whole
    axes, rules = ("layers", ("heads", "embed"), None), rules_of(mesh, config)
    assert spec(axes, rules)[1] == ("tensor", "fsdp")
    assert shards_of(spec(axes, rules), mesh.shape, 3) == [1, 8, 1]
    assert spec((("kv_heads", "embed"),), rules)[0] in ("fsdp", ("fsdp",))
    assert spec((("heads", "embed"),), rules_of(mesh, config, zero=1))[0] in ("tensor", ("tensor",))
    assert (dim_of(axes, "embed"), dim_of(axes, "layers"), dim_of(axes, "mlp")) == (1, 0, None)


def test_before_a_pipeline_what_divides_lies_along_pipe_too():
    mesh = make_mesh(MeshSection(pipe=2, fsdp=4, tensor=1))
    place = axes_sharding(mesh, ModelConfig("qwen2", VOCAB, HIDDEN, 128, LAYERS, 8, 2, 8, 256))
    shards = lambda shape, axes: shards_of(place(shape, axes).spec, mesh.shape, len(shape))  # noqa: E731
    assert shards((LAYERS, 128, 64), ("layers", "mlp", "embed")) == [1, 1, 8]
    assert shards((LAYERS, 128, 36), ("layers", "mlp", "embed")) == [1, 1, 4]
