"""OFT's matrices, its blocks, its dropout, and what it refuses. The peer is peft's OFTRotationModule.

Files, training and the other promises of every method are compared with peft in test_peft_methods.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import ops
from jaxtune.config import make_config, tune_section
from jaxtune.errors import AdapterError, ConfigError, MeshError
from jaxtune.ops import Noise
from jaxtune.tune.oft import Turned, block_size, read_oft, rotations
from tests.programs import Stepper
from tests.tune.support import difference, logits, peer_logits, peer_model, tuned

random = np.random.default_rng(0)
SKEW = jnp.array(random.normal(size=(3, 6)) * 0.1, jnp.float32)  # 3 blocks of 4


def matrices(terms, skew=SKEW):
    return np.eye(4) + np.asarray(rotations(skew, terms))


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 8, None])
def test_the_matrices_are_peft_s(terms):
    torch = pytest.importorskip("torch")
    from peft.tuners.oft.layer import OFTRotationModule

    module = OFTRotationModule(3, 6, 4, 12)
    theirs = module._cayley_batch(torch.tensor(np.array(SKEW)), 4, terms is not None, terms or 0)
    np.testing.assert_allclose(matrices(terms), theirs.numpy(), atol=1e-6)


def test_exact_matrices_are_orthogonal_and_the_series_has_the_other_sign():
    exact = matrices(None)
    np.testing.assert_allclose(exact @ exact.swapaxes(1, 2), np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-6)
    np.testing.assert_allclose(matrices(20, -SKEW), exact, atol=1e-6)
    assert np.abs(matrices(20) - exact).max() > 0.1


def leaf(skew=SKEW, **settings):
    return Turned(jnp.array(random.normal(size=(5, 12)), jnp.float32), skew, **settings)


@pytest.mark.parametrize("share", [False, True])
def test_inputs_are_turned_block_by_block_and_so_is_the_merged_weight(share):
    made = leaf(SKEW[:1] if share else SKEW, terms=5, share=share)
    blocks = np.broadcast_to(matrices(5)[:1], (3, 4, 4)) if share else matrices(5)
    x = random.normal(size=(2, 7, 12)).astype(np.float32)
    turned = np.concatenate([x[..., 4 * k : 4 * k + 4] @ blocks[k] for k in range(3)], axis=-1)
    expected = turned @ np.asarray(made.base).T
    np.testing.assert_allclose(ops.linear(jnp.array(x), made), expected, atol=2e-5)
    np.testing.assert_allclose(x @ np.asarray(ops.dense(made)).T, expected, atol=2e-5)


def test_a_small_turn_survives_bfloat16():
    base = jnp.eye(12)
    x = jnp.array(random.normal(size=(50, 12)), jnp.float32)
    narrow, wide = (ops.linear(x.astype(t), Turned(base, SKEW * 0.01)) for t in (jnp.bfloat16, jnp.float32))
    moved = lambda y: np.asarray(y, np.float32) - np.asarray(x)  # noqa: E731
    assert np.corrcoef(moved(narrow).ravel(), moved(wide).ravel())[0, 1] > 0.2
    assert narrow.dtype == jnp.bfloat16


def test_dropout_leaves_its_share_of_the_blocks_as_they_are_in_training_alone():
    skew = jnp.array(random.normal(size=(8, 6)), jnp.float32)
    made = Turned(jnp.eye(32), skew, dropout=0.4)
    x = jnp.ones((6, 32))
    left = set()
    for key in range(8):
        y = ops.linear(x, made, Noise(jax.random.key(key), jnp.arange(6)))
        kept = np.asarray(y == x).reshape(6, 8, 4).all(axis=-1)
        assert (kept == kept[0]).all() and kept[0].sum() == 3  # int(0.4 * 8), the same ones for every token
        left |= set(np.flatnonzero(kept[0]))
    assert len(left) > 5
    assert not np.asarray(ops.linear(x, made) == x).reshape(6, 8, 4).all(axis=-1).any()


def test_a_fresh_adapter_changes_nothing():
    base = tuned(tune_section(method="full"))
    made = tuned(tune_section(method="oft", targets="all-linear", oft_block_size=8))
    np.testing.assert_array_equal(logits(made.model, made.params), logits(base.model, base.params))


def test_what_does_not_divide_the_inputs_of_an_adapter_is_adjusted_as_in_peft():
    pytest.importorskip("peft")
    from peft.tuners.oft.layer import OFTLayer

    section = tune_section(method="oft", adapter="somewhere")
    for size in (1, 12, 40, 97, 896):
        for asked in (2, 7, 32, 100, 1000):
            expected = OFTLayer.adjust_oft_parameters(None, size, asked) if size % asked or asked > size else asked
            assert block_size(section.model_copy(update={"oft_block_size": asked}), size) == expected
            by_rank = section.model_copy(update={"oft_block_size": 0, "rank": asked})
            assert block_size(by_rank, size) == size // expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 4}, ["oft_block_size 32 and rank 4", "one of them has to be 0"]),
        ({"oft_block_size": 0}, ["one of them has to be 0"]),
        ({"oft_block_size": 1}, ["2 or more"]),
        ({"use_cayley_neumann": False, "num_cayley_neumann_terms": 7}, ["would do nothing"]),
        ({"num_cayley_neumann_terms": 1}, ["num_cayley_neumann_terms", "greater than or equal to 2"]),
        ({"block_share": True, "module_dropout": 0.5}, ["would do nothing with block_share"]),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(options, words):
    tree = {"model": {"path": "-"}, "data": {"path": "-"}, "tune": {"method": "oft", **options}}
    with pytest.raises(ConfigError) as error:
        make_config(tree)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"oft_block_size": 12}, ["tune.oft_block_size 12", "32 inputs of model.layers.0.self_attn.q_proj", "8, 16"]),
        ({"oft_block_size": 0, "rank": 5}, ["tune.rank 5", "1, 2, 4, 8, 16 would"]),
        ({"oft_block_size": 0, "rank": 32}, ["tune.rank 32"]),
        ({"oft_block_size": 8, "module_dropout": 0.2}, ["of the 4 blocks", "0.25 or more"]),
    ],
    ids=str,
)
def test_blocks_that_do_not_fit_a_weight_are_refused_with_those_that_would(options, words):
    with pytest.raises(AdapterError) as error:
        tuned(tune_section(method="oft", **options))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_blocks_that_would_span_two_devices_are_refused_with_those_that_would_not():
    options = {"method": "oft", "targets": ["q_proj", "o_proj"], "oft_block_size": 32}
    with pytest.raises(MeshError) as error:
        Stepper(tune=options, mesh={"tensor": 4})
    words = ["mesh.tensor 4 leaves 16 inputs of model.layers.0.self_attn.o_proj", "oft_block_size 2, 4, 8, 16 would"]
    assert all(word in str(error.value) for word in words), str(error.value)
    Stepper(tune={**options, "targets": ["q_proj"]}, mesh={"tensor": 4})


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"r": 8}, ["no oft_block_size", "0.13"]),
        ({"oft_block_size": 32, "use_cayley_neumann": True}, ["peft_version None", "0.18.0"]),
        ({"oft_block_size": 32, "use_cayley_neumann": True, "peft_version": "0.17.1@abc"}, ["0.17.1"]),
    ],
    ids=str,
)
def test_files_in_which_the_numbers_meant_something_else_are_refused(tree, words, tmp_path):
    with pytest.raises(AdapterError) as error:
        read_oft(tree, tmp_path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_newer_files_and_exact_ones_are_read(tmp_path):
    read_oft({"oft_block_size": 32, "use_cayley_neumann": True, "peft_version": "0.21.2.dev0"}, tmp_path)
    assert read_oft({"r": 4, "oft_block_size": 0, "use_cayley_neumann": False}, tmp_path) == {
        "rank": 4,
        "oft_block_size": 0,
    }


def test_what_does_nothing_in_an_adapter_of_peft_s_is_let_be(tmp_path):
    """peft stores a dropout that turns no block off, for there is one block, or too few for it."""
    from peft import OFTConfig, get_peft_model

    for number, options in enumerate([{"block_share": True, "module_dropout": 0.1}, {"module_dropout": 0.1}]):
        config = OFTConfig(task_type="CAUSAL_LM", r=0, oft_block_size=8, target_modules=["q_proj"], **options)
        model = get_peft_model(peer_model(), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.1)
        model.save_pretrained(tmp_path / str(number))
        made = tuned(tune_section(method="oft", adapter=str(tmp_path / str(number))))
        assert difference(logits(made.model, made.params), peer_logits(model.eval())) < 1e-4
