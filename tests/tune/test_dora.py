"""DoRA's leaf: its norm from the low-rank terms, no gradient through it, dropout as peft has it, on any mesh.

Files, training and the other promises of every method are compared with peft in test_peft_methods.py.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import ops
from jaxtune.config import tune_section
from jaxtune.float8 import Float8, wrapped
from jaxtune.ops import Noise
from jaxtune.tune.dora import Dora
from tests.tune.support import logits, tuned
from tests.tune.test_lora_compiled import ARITHMETIC, RANK, made_in_program, products_compiled

IN, OUT, SCALE = 24, 16, 1.5


def leaf(dropout=0.0, in_size=IN, out_size=OUT, seed=0) -> Dora:
    """A leaf in the midst of training."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.array(random.normal(size=shape), jnp.float32)  # noqa: E731
    base = draw(out_size, in_size)
    return Dora(
        base,
        draw(in_size, RANK) * 0.3,
        draw(RANK, out_size) * 0.3,
        jnp.float32(SCALE),
        dropout,
        magnitude=1 + jnp.abs(draw(out_size)),
        squares=jnp.sum(base**2, axis=1),
    )


def formed(a, b, magnitude, base):
    """m / |W + s B A| (W + s B A) as it is written in the paper, the length a constant."""
    weight = base + SCALE * (a @ b).T
    return (magnitude / jax.lax.stop_gradient(jnp.linalg.norm(weight, axis=1)))[:, None] * weight


X = jnp.array(np.random.default_rng(1).normal(size=(2, 5, IN)), jnp.float32)


def test_the_norm_comes_from_the_low_rank_terms():
    made = leaf()
    expected = X @ formed(made.a, made.b, made.magnitude, made.base).T
    np.testing.assert_allclose(ops.linear(X, made), expected, atol=2e-5)
    np.testing.assert_allclose(X @ ops.dense(made).T, expected, atol=2e-5)


def test_the_norm_has_no_gradient():
    made = leaf()

    def ours(x, *parts):
        return jnp.sum(ops.linear(x, replace(made, **dict(zip(("a", "b", "magnitude"), parts, strict=True)))) ** 2)

    def theirs(x, *parts):
        return jnp.sum((x @ formed(*parts, made.base).T) ** 2)

    arguments = X, made.a, made.b, made.magnitude
    for mine, expected in zip(*(jax.grad(f, range(4))(*arguments) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=2e-4, atol=2e-4)


def test_dropout_is_peft_s(monkeypatch):
    """The same numbers dropped on both sides: of everything but W x itself. The peer is peft's DoraLinearLayer."""
    import torch
    from peft import LoraConfig, get_peft_model

    made = leaf(dropout=0.25)
    net = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(IN, OUT)),
        LoraConfig(r=RANK, lora_alpha=SCALE * RANK, use_dora=True, lora_dropout=0.25, target_modules=["0"]),
    )
    module, tensor = net.base_model.model[0], lambda x: torch.tensor(np.asarray(x))
    with torch.no_grad():
        module.base_layer.weight.copy_(tensor(made.base))
        module.base_layer.bias.zero_()
        module.lora_A["default"].weight.copy_(tensor(made.a.T))
        module.lora_B["default"].weight.copy_(tensor(made.b.T))
        module.lora_magnitude_vector["default"].weight.copy_(tensor(made.magnitude))
    noise = Noise(jax.random.key(3), jnp.arange(10).reshape(2, 5))
    dropped = ops.dropout(X, 0.25, noise)
    assert 0.1 < np.mean(np.asarray(dropped == 0)) < 0.4
    monkeypatch.setattr(module.lora_dropout["default"], "forward", lambda x: tensor(dropped))
    expected = net.train()(tensor(X)).detach().numpy()
    np.testing.assert_allclose(ops.linear(X, made, noise), expected, atol=2e-5)
    assert np.abs(ops.linear(X, made) - expected).max() > 0.1


def test_a_fresh_adapter_changes_nothing_and_one_of_some_layers_nothing_elsewhere():
    base = tuned(tune_section(method="full"))
    expected = logits(base.model, base.params)
    for settings in ({"targets": ["q_proj", "down_proj", "lm_head", "embed_tokens"]}, {"layers": [0, 2]}):
        made = tuned(tune_section(method="dora", **settings))
        np.testing.assert_array_equal(logits(made.model, made.params), expected)
    moved = made.params["stacks"]["0"]["attention"]["q_proj"]["weight"]
    dense = ops.dense(replace(moved, magnitude=2 * moved.magnitude))
    np.testing.assert_allclose(dense, np.array([2, 1, 2])[:, None, None] * moved.base, rtol=1e-6)


def test_a_row_of_zeros_stays_one():
    made = leaf()
    made = replace(made, base=made.base.at[3].set(0), b=made.b.at[:, 3].set(0), squares=made.squares.at[3].set(0))
    grads = jax.grad(lambda leaf: jnp.sum(ops.linear(X, leaf) ** 2))(made)
    assert not np.any(ops.linear(X, made)[..., 3]) and not np.any(ops.dense(made)[3])
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(grads))


SETTINGS = {
    "every linear map": {"targets": "all-linear"},
    "the head": {"targets": ["q_proj", "lm_head"]},
    "dropout": {"targets": "all-linear", "dropout": 0.5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_arithmetic_makes_anything_as_large_as_a_frozen_matrix(settings):
    section = tune_section(method="dora", rank=RANK, **settings)
    assert not {name: count for name, count in made_in_program(section).items() if name[0] in ARITHMETIC}
    assert not products_compiled(section)


def test_the_base_s_float8_is_for_tokens_alone():
    """A W^T is computed in A's own type: its numbers are far smaller than a token's, whose scale may be delayed."""
    scales = jnp.array([1e-6, 1.0, 1.0])  # of tokens so large that all of A would round to zero
    made = leaf()
    coarse = wrapped(made, scales)
    assert isinstance(coarse.base, Float8)
    gains = ops.linear(X, made) / (X @ (made.base + SCALE * (made.a @ made.b).T).T)
    low = ops.linear(X, replace(coarse, magnitude=jnp.zeros(OUT))), ops.linear(X, coarse)
    assert not np.any(low[0])
    alone = ops.linear(
        X, replace(coarse, magnitude=jnp.sqrt(jnp.sum((made.base + SCALE * (made.a @ made.b).T) ** 2, 1)))
    )
    np.testing.assert_allclose(low[1] / alone, gains, rtol=1e-4)
