"""VeRA's shared matrices: PEFT's own numbers, once in the tree, frozen. The peer is peft's VeraModel.

Files, training and the other promises of every method are compared with peft in test_peft_methods.py.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtune import ops
from jaxtune.config import tune_section
from jaxtune.errors import AdapterError
from jaxtune.leaves import partition
from jaxtune.models.weights import HOOKS
from jaxtune.tune.peft_io import save_adapter
from jaxtune.tune.vera import BetweenShared, draw
from tests.tune.support import logits, randomised, tuned

VERA = {"method": "vera", "rank": 6, "targets": ["q_proj", "v_proj", "down_proj"]}


@pytest.mark.parametrize("key", [0, 7, 2**32 + 5])
def test_the_matrices_of_a_key_are_peft_s_in_every_bit(key):
    torch = pytest.importorskip("torch")
    from peft.tuners.vera.model import _kaiming_init

    stream = torch.Generator().manual_seed(key)
    for ours, shape in zip(draw(key, (6, 401), (57, 6)), ((6, 401), (57, 6)), strict=True):
        np.testing.assert_array_equal(ours, _kaiming_init(shape, stream).numpy())


def test_the_matrices_lie_once_in_the_tree_and_do_not_train():
    made = tuned(tune_section(**VERA))
    shapes = {name: array.shape for name, array in made.params[HOOKS].items()}
    assert shapes == {"vera_A": (6, 40), "vera_B": (32, 6)}  # as wide as the widest target: down_proj's 40 inputs
    trainable, frozen = partition(made.params, made.mask)
    assert all(array is not None for array in frozen[HOOKS].values())
    names = {path[-1].name for path, _ in jax.tree_util.tree_leaves_with_path(trainable)}
    assert names == {"lambda_d", "lambda_b"}
    copies = [x for x in jax.tree.leaves(made.params["stacks"]) if x.shape[-2:] in shapes.values()]
    assert not copies


def test_a_map_uses_the_part_that_its_size_needs():
    random = np.random.default_rng(0)
    draws = lambda *shape: jnp.array(random.normal(size=shape), jnp.float32)  # noqa: E731
    made = BetweenShared(draws(5, 8), draws(3), draws(5))
    shared = {"vera_A": draws(3, 10), "vera_B": draws(9, 3)}
    a, b = (np.asarray(shared[name]) for name in ("vera_A", "vera_B"))
    expected = np.asarray(made.base) + (np.asarray(made.lambda_b)[:, None] * b[:5]) @ (
        np.asarray(made.lambda_d)[:, None] * a[:, :8]
    )
    whole, x = made.with_shared(shared), draws(2, 8)
    np.testing.assert_allclose(ops.dense(whole), expected, atol=1e-5)
    np.testing.assert_allclose(ops.linear(x, whole), np.asarray(x) @ expected.T, atol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_has_its_first_values():
    base = tuned(tune_section(method="full"))
    made = tuned(tune_section(**VERA, d_initial=0.25))
    np.testing.assert_allclose(logits(made.model, made.params), logits(base.model, base.params), atol=1e-6)
    leaf = made.params["stacks"]["0"]["mlp"]["down_proj"]["weight"]
    assert np.all(np.asarray(leaf.lambda_d) == 0.25) and not np.any(leaf.lambda_b)


def test_another_key_gives_other_matrices_and_the_seed_does_not():
    first, other = (tuned(tune_section(**VERA, projection_prng_key=key)).params[HOOKS] for key in (0, 1))
    again = tuned(tune_section(**VERA), seed=5).params[HOOKS]
    assert not np.any(np.asarray(first["vera_A"]) == np.asarray(other["vera_A"]))
    np.testing.assert_array_equal(first["vera_B"], again["vera_B"])


@pytest.mark.parametrize("saved", [True, False])
def test_an_adapter_has_the_matrices_or_the_key_that_they_come_from(tmp_path, saved):
    made = randomised(tuned(tune_section(**VERA, projection_prng_key=3, save_projection=saved)))
    save_adapter(tmp_path / "a", made.section, made.model.weights, made.params)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert ("base_model.vera_A" in tensors) is saved
    again = tuned(tune_section(method="vera", adapter=str(tmp_path / "a")))
    np.testing.assert_array_equal(logits(again.model, again.params), logits(made.model, made.params))


def test_matrices_of_a_file_win_over_those_of_its_key(tmp_path):
    made = tuned(tune_section(**VERA))
    made = made._replace(params={**made.params, HOOKS: jax.tree.map(lambda x: x * 2, made.params[HOOKS])})
    save_adapter(tmp_path / "a", made.section, made.model.weights, made.params)
    again = tuned(tune_section(method="vera", adapter=str(tmp_path / "a")))
    np.testing.assert_array_equal(again.params[HOOKS]["vera_A"], made.params[HOOKS]["vera_A"])


def test_neither_matrices_nor_a_key_is_refused(tmp_path):
    made = tuned(tune_section(**VERA, save_projection=False))
    save_adapter(tmp_path / "a", made.section, made.model.weights, made.params)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "projection_prng_key": None}))
    with pytest.raises(AdapterError, match="neither projection_prng_key nor save_projection"):
        tuned(tune_section(method="vera", adapter=str(tmp_path / "a")))


def test_an_excluded_module_is_left_out_in_words_that_peft_has(tmp_path):
    made = tuned(tune_section(**VERA, exclude=["layers.1.self_attn.q_proj"], layers=[0, 1]))
    save_adapter(tmp_path / "a", made.section, made.model.weights, made.params)
    tree = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert "exclude_modules" not in tree
    assert "model.layers.0.self_attn.q_proj" in tree["target_modules"]
    assert len(tree["target_modules"]) == 5


def test_a_leaf_in_the_tree_has_room_for_the_matrices_alone():
    leaf = tuned(tune_section(**VERA)).params["stacks"]["0"]["attention"]["q_proj"]["weight"]
    assert leaf.a is None and leaf.b is None
    assert replace(leaf, dropout=0.5).dropout == 0.5
