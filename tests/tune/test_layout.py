"""Before the weights are declared: which models lose the tie of their head, and how layers fall into stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import tune
from jaxtune.config import tune_section
from jaxtune.models.decoder import Model
from jaxtune.tune.low_rank import LowRank
from tests.tune.support import base_params, logits, model_config, peer_model, tuned

ONE = (range(3),)


def stacks_of(**settings) -> tuple[range, ...]:
    return tune.layout(tune_section(**settings), model_config())[1]


@pytest.mark.parametrize(
    ("settings", "stays_tied"),
    [
        ({"method": "full"}, True),
        ({"method": "freeze", "freeze_embedding": True}, True),
        ({"targets": "all-linear"}, True),
        ({"modules_to_save": ["norm"]}, True),
        ({"targets": ["lm_head"]}, False),
        ({"targets": ["embed_tokens"]}, False),
        ({"targets": r"(model\.)?(embed_tokens|lm_head)"}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
    ],
    ids=str,
)
def test_a_head_stays_tied_until_it_or_the_embedding_is_tuned_apart(settings, stays_tied):
    assert tune.layout(tune_section(**settings), model_config(tied=True))[0].tied == stays_tied


def test_an_untied_model_stays_untied():
    assert not tune.layout(tune_section(), model_config(tied=False))[0].tied


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "full"}, ONE),
        ({"targets": "all-linear"}, ONE),
        ({"bias": "all"}, ONE),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 2}}, ONE),
        # Layers below the first that trains anything need no gradient.
        ({"layers": [1, 2]}, (range(1), range(1, 3))),
        ({"layers": [0, 1]}, ONE),
        ({"layers": [0, 2]}, ONE),
        ({"layers": [2], "targets": ["q_proj", "model.embed_tokens"]}, ONE),
        ({"targets": ["lm_head"]}, ONE),
        ({"modules_to_save": ["layers.1.mlp"]}, (range(1), range(1, 2), range(2, 3))),
        ({"bias": "lora_only", "layers": [0, 1]}, (range(2), range(2, 3))),
        ({"method": "freeze", "freeze_first": 2, "freeze_embedding": True}, (range(2), range(2, 3))),
        ({"method": "freeze", "freeze_last": 2}, (range(1), range(1, 3))),
        ({"method": "freeze", "freeze_embedding": True}, ONE),
        ({"method": "freeze", "train_patterns": ["norm"]}, ONE),
        ({"method": "freeze", "train_patterns": ["model.norm"]}, ONE),
        ({"method": "freeze", "freeze_patterns": [r"layers\.1\..*bias"]}, (range(1), range(1, 2), range(2, 3))),
    ],
    ids=str,
)
def test_layers_of_one_stack_train_the_same_weights(settings, expected):
    assert stacks_of(**settings) == expected


def counted(section, one_stack: bool) -> tuple[int, int]:
    config, stacks = tune.layout(section, model_config(), one_stack)
    weights = Model.create(config, stacks, hooks=tune.hooks(section, config)).weights
    return tune.counts(section, weights, *tune.apply(section, base_params(weights), weights, 0))


@pytest.mark.parametrize("settings", [{"freeze_first": 2}, {"freeze_first": 1, "freeze_embedding": True}], ids=str)
@pytest.mark.parametrize("one_stack", [False, True], ids=["stacks", "one stack"])
def test_layers_of_an_undivided_stack_that_stay_as_they_are_do_not_count_as_training(settings, one_stack):
    section, frozen = tune_section(method="freeze", **settings), settings["freeze_first"]
    sizes = {name: weight.numel() for name, weight in peer_model().named_parameters()}
    trained = {
        name: size
        for name, size in sizes.items()
        if not name.startswith(tuple(f"model.layers.{layer}." for layer in range(frozen)))
        and not ("embed_tokens" in name and section.freeze_embedding)
    }
    assert counted(section, one_stack) == (sum(trained.values()), sum(sizes.values()))


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"layers": [0, 2]}, {"layers_to_transform": [0, 2]}),
        ({"layers": [2]}, {"layers_to_transform": [2]}),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 8}}, {"rank_pattern": {"layers.1.self_attn.q_proj": 8}}),
    ],
    ids=str,
)
@pytest.mark.parametrize("one_stack", [False, True], ids=["stacks", "one stack"])
def test_as_many_numbers_train_as_in_peft(settings, theirs, one_stack):
    from peft import LoraConfig, get_peft_model

    peer = get_peft_model(peer_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **theirs))
    section = tune_section(method="lora", rank=4, targets=["q_proj", "v_proj"], **settings)
    assert counted(section, one_stack)[0] == peer.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("settings", [{"layers": [1, 2]}, {"modules_to_save": ["layers.1.mlp"]}], ids=str)
def test_a_fresh_adapter_on_several_stacks_computes_what_the_base_does(settings):
    made, whole = tuned(tune_section(**settings)), tuned(tune_section(method="full"))
    np.testing.assert_allclose(logits(made.model, made.params), logits(whole.model, whole.params), atol=1e-5)


def test_more_than_ten_stacks_are_in_the_order_of_their_layers():
    section, deep = tune_section(method="freeze", train_patterns=[r"layers\.\d*[02468]\."]), {"num_hidden_layers": 13}
    made, whole = tuned(section, **deep), tuned(tune_section(method="full"), **deep)
    assert len(made.model.stacks) == 13
    np.testing.assert_allclose(logits(made.model, made.params), logits(whole.model, whole.params), atol=1e-5)


def test_a_stack_without_adapters_has_plain_leaves():
    made = tuned(tune_section(layers=[1, 2]))
    below, above = (made.params["stacks"][name]["attention"]["q_proj"]["weight"] for name in "01")
    assert isinstance(below, jax.Array) and isinstance(above, LowRank)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_untied_head_shares_the_embedding_s_buffer_while_both_are_frozen(target):
    params = tuned(tune_section(targets=[target])).params
    embedding, head = params["embed"]["weight"], params["head"]["weight"]
    arrays = [leaf.base if isinstance(leaf, LowRank) else leaf for leaf in (embedding, head)]
    assert arrays[0].unsafe_buffer_pointer() == arrays[1].unsafe_buffer_pointer()


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_an_untied_head_has_a_buffer_of_its_own_where_one_of_the_two_trains(saved):
    params = tuned(tune_section(modules_to_save=saved)).params
    embedding, head = params["embed"]["weight"], params["head"]["weight"]
    assert embedding.unsafe_buffer_pointer() != head.unsafe_buffer_pointer()
    np.testing.assert_array_equal(embedding, head)


def test_a_head_that_was_loaded_is_left_as_it_is():
    section = tune_section(targets=["lm_head"])
    config, stacks = tune.layout(section, model_config(tied=False))
    weights = Model.create(config, stacks).weights
    params = base_params(weights, tied=False)
    head = params["head"]["weight"]
    assert tune.apply(section, params, weights, 0)[0]["head"]["weight"].base is head


def test_the_callers_tree_is_not_changed():
    section = tune_section(targets=["lm_head", "q_proj"], modules_to_save=["norm"])
    config, stacks = tune.layout(section, model_config())
    weights = Model.create(config, stacks).weights
    params = base_params(weights, dtype=jnp.bfloat16)
    before = jax.tree.structure(params)
    tune.apply(section, params, weights, 0)
    assert jax.tree.structure(params) == before
    assert all(array.dtype == jnp.bfloat16 for array in jax.tree.leaves(params))
