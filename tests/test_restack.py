"""A run goes on, and is loaded, whether its mesh had a pipeline or not: what trains lies in other stacks then."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxtune
from jaxtune.config import make_config
from jaxtune.errors import CheckpointError
from jaxtune.export import export_run
from jaxtune.restack import _joiner, move
from jaxtune.tune.full import FreezeSection, FullSection
from tests.programs import CONFIG
from tests.runs import sections, stopped_after, unfinish

PLAIN, PIPELINE = {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "pipe": 2}
LORA = {"method": "lora", "rank": 4, "targets": ["q_proj", "down_proj"]}
MESHES = {"from a pipeline": (PIPELINE, PLAIN), "to one": (PLAIN, PIPELINE)}
OFTEN = "freeze", "to one"
WAYS = {
    "freeze": {"tune": {"method": "freeze", "freeze_first": 1}},
    "freeze, the last layer": {"tune": {"method": "freeze", "freeze_last": 1}},
    "ia3, layer 1": {"tune": {"method": "ia3", "layers": [1]}},
    "lora, layers 2 and 3": {"tune": {**LORA, "layers": [2, 3]}},
    "lora, biases of one layer": {"tune": {**LORA, "layers": [1], "bias": "lora_only"}, "optim": {"name": "adafactor"}},
    "lora, ranks of their own": {
        "tune": {
            **LORA,
            "layers": [1, 2, 3],
            "modules_to_save": ["model.layers.1.self_attn.v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        },
    },
    "norms of three layers": {"tune": {"method": "layernorm", "exclude": ["model.layers.2.input_layernorm"]}},
    "freeze, 8 bits": {"tune": {"method": "freeze", "freeze_first": 2}, "optim": {"name": "adamw_8bit", "eps": 1e-5}},
    "freeze, on the host": {
        "tune": {"method": "freeze", "freeze_first": 2},
        "memory": {"offload": ["params", "optimizer"]},
    },
    "houlsby without a layer": {"tune": {"method": "houlsby", "leave_out": [1]}},
    "adalora": {
        "tune": {"method": "adalora", "targets": ["q_proj"], "init_r": 4, "target_r": 3, "tfinal": 1, "layers": [1, 3]}
    },
}
FLOAT8 = {"tune": {**LORA, "layers": [2, 3]}, "precision": {"matmul": "float8", "float8_scaling": "delayed"}}
CASES = [
    pytest.param(way, *meshes, id=f"{way}, {name}", marks=[] if (way, name) == OFTEN else pytest.mark.thorough)
    for way in WAYS
    for name, meshes in MESHES.items()
]


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """whole(way) -> (losses, tensors) of the run without a pipeline that nothing stopped."""
    made = {}

    def make(way):
        if way not in made:
            home = tmp_path_factory.mktemp("whole")
            made[way] = (
                losses(jaxtune.train(run(tiny_model(num_hidden_layers=4), home, WAYS[way], PLAIN))),
                tensors(home),
            )
        return made[way]

    return make


def run(model, home, sections_of, mesh):
    """The configuration. A larger epsilon: Adam turns a gradient that is nothing but rounding into whole steps."""
    own = {"optim": {"eps": 1e-5}, **sections_of, "train": {"micro_batches": 2}, "mesh": mesh}
    return make_config(sections(model, home, **own))


def losses(rows):
    return [row["loss"] for row in rows]


def tensors(home):
    (file,) = [path for name in ("adapter", "model") for path in (home / "run" / name).glob("*.safetensors")]
    return load_file(file)


@pytest.mark.parametrize(("way", "before", "after"), CASES)
def test_a_run_goes_on_over_a_pipeline_and_without_one(way, before, after, tiny_model, tmp_path, whole):
    model = tiny_model(num_hidden_layers=4)
    with pytest.raises(SystemExit):
        stopped_after(2, run(model, tmp_path, WAYS[way], before))
    rows = jaxtune.train(run(model, tmp_path, WAYS[way], after))
    expected, weights = whole(way)
    np.testing.assert_allclose(losses(rows), expected, atol=2e-5)
    found = tensors(tmp_path)
    assert found.keys() == weights.keys()
    for name in weights:
        np.testing.assert_allclose(found[name], weights[name], atol=2e-4, err_msg=name)


@pytest.mark.thorough
@pytest.mark.parametrize(("before", "after"), MESHES.values(), ids=MESHES)
def test_histories_of_float8_go_along_where_there_are_any(before, after, tiny_model, tmp_path):
    """Over a pipeline the layers below those that train have some too, and none to go on from."""
    model = tiny_model(num_hidden_layers=4)
    with pytest.raises(SystemExit):
        stopped_after(2, run(model, tmp_path, FLOAT8, before))
    rows = jaxtune.train(run(model, tmp_path, FLOAT8, after))
    whole = jaxtune.train(run(model, tmp_path / "whole", FLOAT8, before))
    np.testing.assert_allclose(losses(rows), losses(whole), atol=0.05)


@pytest.mark.parametrize(
    ("way", "mesh"),
    [
        ("lora, layers 2 and 3", PIPELINE),
        pytest.param("freeze, the last layer", PIPELINE, marks=pytest.mark.thorough),
        pytest.param("freeze", PLAIN, marks=pytest.mark.thorough),
        pytest.param("lora, ranks of their own", PLAIN, marks=pytest.mark.thorough),
    ],
)
def test_a_run_that_has_not_finished_is_loaded_with_its_layers_apart_and_exported(
    way, mesh, tiny_model, tmp_path, layers_apart
):
    config = run(tiny_model(num_hidden_layers=4), tmp_path, WAYS[way], mesh)
    jaxtune.train(config)
    tokens = np.arange(16).reshape(2, 8)
    expected = jaxtune.load_model(tmp_path / "run").logits(tokens)
    unfinish(tmp_path / "run")
    np.testing.assert_allclose(jaxtune.load_model(tmp_path / "run").logits(tokens), expected, atol=1e-5)
    assert export_run(tmp_path / "run", tmp_path / "merged", "hf").step == 4
    np.testing.assert_allclose(jaxtune.load_model(tmp_path / "merged").logits(tokens), expected, atol=1e-4)


def test_what_is_in_neither_kind_of_stacks_is_read_as_it_is_wanted_and_so_refused():
    array = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    wanted = {"stacks": {"1": {"weight": array}}, "norm": array}
    way = partial(move, wanted, section=FreezeSection(freeze_first=2), config=CONFIG, own=(range(2), range(2, 4)))
    moved = way({"stacks/0/weight": ["float32", 4, 8], "norm": ["float32", 2, 8]})
    assert moved.cuts == {"stacks/1/weight": (("stacks/0/weight", 2, 4),)} and not moved.gaps
    assert way({"stacks/1/weight": ["float32", 2, 8]}).needed is wanted
    assert way({"stacks/0/other": ["float32", 4, 8]}).needed is wanted


def test_a_name_that_both_kinds_of_stacks_have_is_of_the_kind_with_as_many_layers():
    wanted = {"stacks": {"1": {"weight": jax.ShapeDtypeStruct((1, 8), jnp.float32)}}}
    apart = tuple(range(layer, layer + 1) for layer in range(4))
    for layers in (2, 4):
        moved = move(wanted, {"stacks/0/weight": ["float32", layers, 8]}, FreezeSection(freeze_last=2), CONFIG, apart)
        assert moved.cuts == {"stacks/1/weight": (("stacks/0/weight", 1, 2),)}
        assert moved.pieces["stacks/0/weight"].shape == (layers, 8)


def test_layers_are_put_apart_by_one_program():
    apart, saved = tuple(range(layer, layer + 1) for layer in range(4)), jnp.arange(32.0).reshape(4, 8)
    home = saved.sharding
    array = jax.ShapeDtypeStruct((1, 8), jnp.float32, sharding=home)
    wanted = {"stacks": {str(layer): {"weight": array} for layer in range(4)}}
    way = move(wanted, {"stacks/0/weight": ["float32", 4, 8]}, FullSection(), CONFIG, apart)
    _joiner.cache_clear()
    found = way.joined({"stacks/0/weight": saved + 0}, {})
    for layer in range(4):
        np.testing.assert_array_equal(found["stacks"][str(layer)]["weight"], saved[layer : layer + 1])
    assert _joiner.cache_info().currsize == 1 and _joiner((1,), (8,), home)._cache_size() == 1


@pytest.mark.parametrize(
    ("wanted", "first", "second"),
    [
        (
            {"a": ("float32", 4, 8)},
            {"a": ["float32", 2, 8]},
            {"a/codes": ["uint8", 2, 8], "a/absmax": ["float32", 2, 1]},
        ),
        ({"a": {"codes": ("uint8", 4, 8)}}, {"a/codes": ["uint8", 2, 8]}, {"a": ["float32", 2, 8]}),
        ({"a": {"codes": ("uint8", 4, 8)}}, {"a/codes": ["uint8", 2, 8]}, {"a/codes": ["uint8", 2, 16]}),
    ],
)
def test_moments_of_8_bits_that_lie_otherwise_in_the_other_stacks_are_refused(wanted, first, second):
    """They are no layers without a state of their own, which would begin anew."""
    made = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one[1:], one[0]), wanted, is_leaf=lambda x: isinstance(x, tuple)
    )
    saved = {
        f"optimizer/stacks/{number}/{path}": s
        for number, part in enumerate((first, second))
        for path, s in part.items()
    }
    with pytest.raises(CheckpointError, match=r"optimizer/stacks/0/a.*: the moments of optim.name adamw_8bit"):
        move({"optimizer": {"stacks": {"0": made}}}, saved, FreezeSection(freeze_first=2), CONFIG, (range(4),))
