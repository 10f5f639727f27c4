"""LoHa's update: the same formed and not formed, recomputed and not kept. Compared with what the paper writes.

Files, training and the other promises of every method are compared with peft in test_peft_methods.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals
from jax.ad_checkpoint import checkpoint_policies

from jaxtune import ops
from jaxtune.config import tune_section
from jaxtune.tune.loha import Hadamard, update
from tests.tune.support import logits, tuned

INPUTS, OUTPUTS, TOKENS = 24, 16, 5
NARROW, WIDE = 2, 4  # below and above the rank from which the update is formed: rank^2 (24 + 16) against 24 * 16


def factors(rank, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(OUTPUTS, rank), (rank, INPUTS)] * 2
    return [jnp.array(random.normal(size=shape), jnp.float32) for shape in shapes]


def formed(x, w1_a, w1_b, w2_a, w2_b):
    return x @ ((w1_a @ w1_b) * (w2_a @ w2_b)).T


X = jnp.array(np.random.default_rng(9).normal(size=(TOKENS, INPUTS)), jnp.float32)


@pytest.mark.parametrize("rank", [NARROW, WIDE])
def test_the_update_and_its_gradients_are_the_formed_ones(rank):
    loss = lambda function: lambda *args: jnp.sum(jnp.sin(function(*args)))  # noqa: E731
    where = tuple(range(5))
    ours = jax.value_and_grad(loss(update), where)(X, *factors(rank))
    theirs = jax.value_and_grad(loss(formed), where)(X, *factors(rank))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("rank", [NARROW, WIDE])
@pytest.mark.parametrize("policy", [None, "everything_saveable", "dots_saveable"])
def test_nothing_but_what_comes_in_is_kept_for_the_backward_pass(rank, policy):
    run = update if policy is None else jax.checkpoint(update, policy=getattr(checkpoint_policies, policy))
    kept = [aval.shape for aval, _ in saved_residuals(lambda *args: jnp.sum(run(*args) ** 2), X, *factors(rank))]
    allowed = {X.shape, (TOKENS, OUTPUTS), (), *(array.shape for array in factors(rank))}
    assert set(kept) <= allowed


def test_a_narrow_update_is_never_formed():
    text = str(jax.make_jaxpr(update)(X, *factors(NARROW)))
    assert f"[{OUTPUTS},{INPUTS}]" not in text
    assert f"[{OUTPUTS},{INPUTS}]" in str(jax.make_jaxpr(update)(X, *factors(WIDE)))


def test_the_merged_weight_is_the_leaf_s():
    base = jnp.array(np.random.default_rng(1).normal(size=(OUTPUTS, INPUTS)), jnp.float32)
    leaf = Hadamard(base, *factors(NARROW), jnp.float32(1.5))
    expected = X @ base.T + 1.5 * formed(X, *factors(NARROW))
    np.testing.assert_allclose(ops.linear(X, leaf), expected, atol=1e-4)
    np.testing.assert_allclose(X @ ops.dense(leaf).T, expected, atol=1e-4)


def test_a_fresh_adapter_changes_nothing_and_starts_as_in_peft():
    options = {"method": "loha", "rank": 4, "targets": ["q_proj", "down_proj"]}
    base, made = tuned(tune_section(method="full")), tuned(tune_section(**options))
    np.testing.assert_array_equal(logits(made.model, made.params), logits(base.model, base.params))
    leaf = made.params["stacks"]["0"]["mlp"]["down_proj"]["weight"]
    for part, bound in ((leaf.w1_a, 4**-0.5), (leaf.w1_b, 40**-0.5), (leaf.w2_a, 4**-0.5)):
        assert 0.9 * bound < np.abs(part).max() <= bound
    assert not np.any(leaf.w2_b)
    assert not np.any(np.asarray(leaf.w1_a) == np.asarray(leaf.w2_a))


def test_a_layer_s_numbers_depend_on_neither_the_others_ranks_nor_the_stack():
    options = {"method": "loha", "rank": 2}
    plain = tuned(tune_section(**options)).params["stacks"]["0"]["attention"]["q_proj"]["weight"]
    padded = tuned(tune_section(**options, rank_pattern={"layers.1.self_attn.q_proj": 5}))
    leaf = padded.params["stacks"]["0"]["attention"]["q_proj"]["weight"]
    np.testing.assert_array_equal(leaf.w1_a[0, :, :2], plain.w1_a[0])
    np.testing.assert_array_equal(leaf.w1_b[2, :2], plain.w1_b[2])
    assert not np.any(leaf.w1_a[0, :, 2:]) and not np.any(leaf.w1_b[0, 2:])
    np.testing.assert_allclose(leaf.scale, [8 / 2, 8 / 5, 8 / 2])
