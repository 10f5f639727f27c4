"""LoRA leaves: their first values, their masks, their shapes without arrays, their padding, their shards."""

from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import tune
from jaxtune.config import OptimSection, tune_section
from jaxtune.errors import AdapterError
from jaxtune.leaves import combine, count, partition
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import Model
from jaxtune.optim import descend, make_optimizer
from jaxtune.tune.lora import LORA
from jaxtune.tune.low_rank import LowRank
from jaxtune.tune.plan import make_plan
from tests.tune.support import TOKENS, base_params, logits, model_config, randomised, settings_id, tuned

QWEN2_5_0_5B = ModelConfig("qwen2", 151936, 896, 4864, 24, 14, 2, 64, 32768, tied=True, qkv_bias=True)


def leaf(made, name: str = "q_proj", stack: str = "0") -> LowRank:
    part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "attention"
    return made.params["stacks"][stack][part][name]["weight"]


def test_the_seed_recipe_has_96_tensors_and_540_672_numbers():
    section = tune_section(rank=8, alpha=32, targets=["q_proj", "v_proj"])
    config, stacks = tune.layout(section, QWEN2_5_0_5B)
    weights = Model.create(config, stacks).weights
    tensors = LORA.files.entries(section, weights)
    assert len(tensors) == 96
    assert sum(int(np.prod(entry.shape)) for entry in tensors) == 540_672
    assert {scale for site in make_plan(section, weights).sites.values() for scale in site.scales} == {4.0}
    assert tensors[0].key == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_a_rank_above_both_sides_of_a_weight_is_told():
    wide = tune_section(rank=896, targets=["q_proj", "k_proj", "down_proj"], rank_pattern={"k_proj": 897})
    (note,) = tune.check(wide, QWEN2_5_0_5B)
    assert "a rank above both sides of a weight (897 on k_proj, of 896 and 128): the adapter is larger" in note
    assert tune.check(tune_section(rank=8), QWEN2_5_0_5B) == []
    for method, key, named in (("loha", "rank", "tune.rank or rank_pattern"), ("adalora", "init_r", "tune.init_r")):
        square = {"method": method, "targets": ["q_proj"]}
        assert tune.check(tune_section(**square, **{key: 896}), QWEN2_5_0_5B) == []
        (note,) = tune.check(tune_section(**square, **{key: 897}), QWEN2_5_0_5B)
        assert note.startswith(f"{named}: a rank above both sides of a weight (897 on q_proj, of 896 and 896): ")
    with pytest.raises(AdapterError, match=r'"qproj".*did you mean "q_proj"'):
        tune.check(tune_section(targets=["qproj"]), QWEN2_5_0_5B)


def test_a_fresh_adapter_changes_nothing():
    base = tuned(tune_section(method="full"))
    made = tuned(tune_section(targets=["q_proj", "down_proj", "lm_head", "embed_tokens"]))
    np.testing.assert_array_equal(logits(made.model, made.params), logits(base.model, base.params))


def test_a_starts_uniform_within_one_over_the_root_of_its_inputs_and_b_at_zero():
    made = tuned(tune_section(rank=64, targets="all-linear"))
    for name, inputs in (("q_proj", 32), ("down_proj", 40)):
        a, bound = np.asarray(leaf(made, name).a), inputs**-0.5
        assert a.shape == (3, inputs, 64)
        assert a.min() >= -bound and a.max() <= bound
        assert a.min() < -0.98 * bound and a.max() > 0.98 * bound
        assert abs(a.std() - bound / 3**0.5) < 0.03 * bound and abs(a.mean()) < 0.03 * bound
        assert not np.any(leaf(made, name).b)


def test_a_gaussian_start_has_deviation_one_over_the_rank_of_its_layer():
    made = tuned(tune_section(rank=40, init="gaussian", rank_pattern={"layers.1.self_attn.q_proj": 10}))
    a = np.asarray(leaf(made).a)
    assert abs(a[0].std() * 40 - 1) < 0.05
    assert abs(a[1, :, :10].std() * 10 - 1) < 0.1


def test_an_embedding_starts_with_a_at_zero_and_b_normal():
    embedding = tuned(tune_section(rank=50, targets=["embed_tokens"])).params["embed"]["weight"]
    assert embedding.a.shape == (48, 50) and embedding.b.shape == (50, 32)
    assert not np.any(embedding.a)
    assert abs(np.asarray(embedding.b).std() - 1) < 0.05


def test_the_scale_is_alpha_over_the_rank_or_over_its_root():
    pattern = {"rank_pattern": {"layers.1.self_attn.q_proj": 16}, "alpha_pattern": {"layers.2.self_attn.q_proj": 2}}
    np.testing.assert_allclose(leaf(tuned(tune_section(rank=4, alpha=8, **pattern))).scale, [2.0, 0.5, 0.5])
    rooted = tuned(tune_section(rank=4, alpha=8, use_rslora=True, **pattern))
    np.testing.assert_allclose(leaf(rooted).scale, [4.0, 2.0, 1.0])


def test_first_values_depend_on_the_seed_and_the_module_name_alone():
    plain = leaf(tuned(tune_section(rank=4)))
    assert np.unique(plain.a).size == plain.a.size, "layers share numbers"
    # Another method for another module, other stacks, other ranks in the stack: the same numbers.
    shuffled = tuned(tune_section(rank=4, targets="all-linear", modules_to_save=["layers.1.input_layernorm"]))
    assert len(shuffled.model.stacks) == 3
    for layer in range(3):
        np.testing.assert_array_equal(plain.a[layer], leaf(shuffled, stack=str(layer)).a[0])
    wider = leaf(tuned(tune_section(rank=4, rank_pattern={"layers.1.self_attn.q_proj": 9})))
    np.testing.assert_array_equal(plain.a[0], wider.a[0, :, :4])
    assert not np.any(wider.a[0, :, 4:])
    np.testing.assert_array_equal(plain.a[1], wider.a[1, :, :4])
    assert not np.any(plain.a == leaf(tuned(tune_section(rank=4), seed=1)).a)


def test_only_adapters_train():
    made = tuned(tune_section(rank=4, targets=["q_proj", "lm_head"]))
    trainable, frozen = partition(made.params, made.mask)
    arrays = jax.tree_util.tree_leaves_with_path(trainable)
    assert {path[-1].name for path, _ in arrays} == {"a", "b"}
    assert count(trainable) == 3 * (32 * 4 + 4 * 32) + (32 * 4 + 4 * 48)
    assert jax.tree.structure(combine(trainable, frozen)) == jax.tree.structure(made.params)
    assert jax.tree.structure(made.mask) == jax.tree.structure(made.params)


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ({"bias": "all"}, {"q_proj", "k_proj", "v_proj"}),
        ({"bias": "lora_only"}, {"q_proj", "v_proj"}),
        ({"modules_to_save": ["k_proj"]}, {"k_proj"}),
        ({}, set()),
    ],
    ids=settings_id,
)
def test_biases_train_as_the_bias_setting_says(settings, whole):
    made = tuned(tune_section(**settings))
    attention = made.mask["stacks"]["0"]["attention"]
    assert {name for name in attention if attention[name].get("bias")} == whole


def test_what_trains_is_float32_and_what_is_frozen_keeps_its_type():
    section = tune_section(modules_to_save=["norm", "lm_head"], bias="lora_only")
    config, stacks = tune.layout(section, model_config())
    weights = Model.create(config, stacks).weights
    params, mask = tune.apply(section, base_params(weights, dtype=jnp.bfloat16), weights, 0)
    trainable, frozen = partition(params, mask)
    assert {array.dtype.name for array in jax.tree.leaves(trainable)} == {"float32"}
    scales = [
        value.scale
        for value in jax.tree.leaves(params, is_leaf=lambda v: isinstance(v, LowRank))
        if isinstance(value, LowRank)
    ]
    assert {scale.dtype.name for scale in scales} == {"float32"}
    kept = {array.dtype.name for array in jax.tree.leaves(frozen) if not any(array is scale for scale in scales)}
    assert kept == {"bfloat16"}


SETTINGS = {
    "full": {"method": "full"},
    "freeze": {"method": "freeze", "freeze_first": 1},
    "lora": {"targets": ["q_proj", "lm_head"], "modules_to_save": ["norm"], "rank_pattern": {"layers.1.*": 3}},
}


@pytest.mark.parametrize("way", ["shapes", "eval_shape"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_everything_is_known_without_an_array(settings, way):
    section = tune_section(**settings)
    config, stacks = tune.layout(section, model_config())
    weights = Model.create(config, stacks).weights
    arrays = base_params(weights, dtype=jnp.bfloat16)
    params, mask = tune.apply(section, arrays, weights, 0)
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arrays)
    masks = []

    def planned(tree):
        tree, found = tune.apply(section, tree, weights, 0)
        masks.append(found)
        return tree

    expected = planned(shapes) if way == "shapes" else jax.eval_shape(planned, shapes)
    assert masks == [mask]
    assert jax.tree.structure(expected) == jax.tree.structure(params)
    for shape, array in zip(jax.tree.leaves(expected), jax.tree.leaves(params), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)


PADDED = {"rank": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 1}, "layers": [0, 2]}


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "lion", "adafactor"])
def test_padding_stays_zero_under_every_optimizer(optimizer):
    made = randomised(tuned(tune_section(**PADDED, targets=["q_proj", "v_proj"])))
    trainable, frozen = partition(made.params, made.mask)
    rule = make_optimizer(OptimSection(name=optimizer, weight_decay=0.1), made.model.weights)

    def loss(trainable):
        positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
        hidden, _ = made.model.hidden(combine(trainable, frozen), TOKENS, positions, jnp.ones_like(TOKENS))
        return jnp.mean(made.model.logits(made.params, hidden) ** 2)

    @jax.jit
    def step(trainable, state):
        direction, state = rule.update(jax.grad(loss)(trainable), state, trainable)
        return descend(trainable, direction, 0.01), state

    state, start = rule.init(trainable), leaf(made)
    for _ in range(3):
        trainable, state = step(trainable, state)
    end = trainable["stacks"]["0"]["attention"]["q_proj"]["weight"]
    for before, after in ((start.a, end.a), (start.b, end.b)):
        moved = np.asarray(before != after)
        assert moved[0].any() and moved[2].any()
        np.testing.assert_array_equal(
            np.asarray(before)[np.asarray(before) == 0], np.asarray(after)[np.asarray(before) == 0]
        )
    assert not np.any(end.a[1]) and not np.any(end.b[1])
    assert not np.any(end.a[0, :, 2:]) and not np.any(end.b[0, 2:])


def test_the_layers_shapes_are_told_where_ranks_differ():
    attention = ("stacks", "0", "attention")
    made = tuned(tune_section(**PADDED, targets=["q_proj", "v_proj"], modules_to_save=["norm"]))
    assert tune.shapes(made.section, made.model.weights) == {
        (*attention, "q_proj", "weight", "a"): [(2, 32), (0,), (4, 32)],
        (*attention, "q_proj", "weight", "b"): [(32, 2), (0,), (32, 4)],
    }
    assert tune.shapes(tune_section(method="full"), made.model.weights) == {}


def test_adapters_lie_along_their_base_s_axes():
    asked = []

    def sharding_of(shape, axes):
        asked.append((shape, axes))
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])

    section = tune_section(rank=4, targets=["down_proj", "embed_tokens"])
    config, stacks = tune.layout(section, model_config(tied=False))
    weights = Model.create(config, stacks).weights
    tune.apply(section, base_params(weights, tied=False), weights, 0, sharding_of)
    assert asked == [
        ((48, 4), ("vocab", "rank")),
        ((4, 32), ("rank", "embed")),
        ((), ()),
        ((3, 40, 4), ("layers", "mlp", "rank")),
        ((3, 4, 32), ("layers", "rank", "embed")),
        ((3,), ("layers",)),
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": ["q_prj"]}, ['"q_prj"', 'did you mean "q_proj"', "lm_head"]),
        ({"targets": ["q_proj", "qkv"]}, ['no module is named "qkv"']),
        ({"targets": []}, ["tune.targets is empty"]),
        ({"targets": "q_proj"}, ["regular expression over the whole name", "[q_proj]"]),
        ({"targets": "all_linear"}, ['no module has such a name; did you mean "all-linear"?']),
        ({"targets": ["all"]}, ['no module is named "all"; "all-linear" stands alone, as text: targets: all-linear']),
        ({"targets": ["all-linear"]}, ['"all-linear" stands alone, as text']),
        ({"targets": "all"}, ['did you mean "all-linear"?']),
        ({"targets": "q_proj,v_proj"}, ["write a list: [q_proj, v_proj]"]),
        ({"targets": r"model\.layer\..*"}, ["no module has such a name", "layers"]),
        ({"targets": "q_proj("}, ["not a regular expression"]),
        ({"targets": ["mlp"]}, ["model.layers.0.mlp", "neither a linear map nor the embedding"]),
        ({"targets": ["norm"]}, ["model.norm", "neither"]),
        ({"targets": r".*_proj", "layers": [0]}, ["tune.layers", "into the regex"]),
        ({"exclude": ["v_proj", "o_proj"]}, ["tune.exclude", '"o_proj" excludes no target']),
        ({"exclude": []}, ["tune.exclude is empty"]),
        ({"exclude": r".*self_attn.*"}, ["excluded"]),
        ({"exclude": "*"}, ["tune.exclude", "not a regular expression"]),
        ({"layers": [1, 3]}, ["tune.layers: 3", "0 to 2"]),
        ({"layers": []}, ["tune.layers: an empty list"]),
        ({"rank_pattern": {"k_proj": 2}}, ["tune.rank_pattern", '"k_proj" decides for no target']),
        ({"alpha_pattern": {"q_proj": 2, ".*q_proj": 3}}, ["tune.alpha_pattern", "decides for no target"]),
        ({"rank_pattern": {"(": 2}}, ["tune.rank_pattern", "not a regular expression"]),
        ({"rank_pattern": {"(?i)Q_proj": 4}}, ['tune.rank_pattern: "(?i)Q_proj" stands within', "(?i:name)"]),
        ({"alpha_pattern": {"(?i)Q_proj": 4}}, ['tune.alpha_pattern: "(?i)Q_proj" stands within', "(?i:name)"]),
        ({"modules_to_save": ["(?i)norm"]}, ['tune.modules_to_save: "(?i)norm" stands within', "(?i:name)"]),
        ({"modules_to_save": ["lm_hed"]}, ["tune.modules_to_save", 'did you mean "lm_head"']),
        ({"modules_to_save": ["q_proj", "roj"]}, ["both match"]),
        ({"modules_to_save": ["self_attn"]}, ["saved whole"]),
        ({"targets": ["o_proj"], "bias": "lora_only"}, ["tune.bias lora_only", "a target"]),
        ({"targets": ["embed_tokens"], "dropout": 0.1}, ["tune.dropout", "linear maps only"]),
    ],
    ids=settings_id,
)
def test_a_setting_that_matches_nothing_or_does_nothing_is_named(settings, words):
    with pytest.raises(AdapterError) as error:
        tune.layout(tune_section(**settings), model_config())
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_pattern_with_a_flag_for_itself_decides():
    made = tuned(tune_section(targets=["q_proj"], rank_pattern={"(?i:Q_PROJ)": 4}))
    assert leaf(made).a.shape[-1] == 4


def test_biases_of_a_model_without_any_cannot_be_trained():
    with pytest.raises(AdapterError, match=r"tune.bias all: no module of the model has a bias"):
        tune.layout(tune_section(bias="all"), model_config("llama"))


def test_a_leaf_has_no_part_that_this_file_forgets():
    assert [field.name for field in fields(LowRank)] == ["base", "a", "b", "scale", "dropout"]
    assert leaf(tuned(tune_section(dropout=0.25))).dropout == 0.25
