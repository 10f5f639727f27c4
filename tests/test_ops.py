"""Dropout and a product by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.ops import Noise, dropout, linear

TOKENS, FEATURES = 64, 4096


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_it_drops_its_share_of_every_token_anew_and_keeps_the_mean(rate):
    noise = Noise(jax.random.key(0), jnp.arange(TOKENS))
    found = np.asarray(dropout(jnp.ones((TOKENS, FEATURES)), rate, noise))
    np.testing.assert_allclose(np.unique(found), [0, 1 / (1 - rate)], rtol=1e-6)
    deviation = np.sqrt(rate * (1 - rate) / found.size)
    assert abs((found == 0).mean() - rate) < 5 * deviation + 1 / 65536
    assert len({row.tobytes() for row in found}) == TOKENS


def test_nearly_all_may_be_dropped_but_not_more():
    noise = Noise(jax.random.key(0), jnp.arange(TOKENS))
    found = np.asarray(dropout(jnp.ones((TOKENS, FEATURES)), 1 - 1e-7, noise))
    assert np.isfinite(found).all() and 0 < (found != 0).sum() < 30


@pytest.mark.parametrize("given", [{"rate": 0.0}, {"noise": None}])
def test_without_a_rate_or_noise_nothing_is_dropped(given):
    x = jnp.ones((2, 3))
    noise = Noise(jax.random.key(0), jnp.arange(2))
    assert dropout(x, **{"rate": 0.5, "noise": noise, **given}) is x


def test_a_weights_gradient_is_a_product_of_matrices_as_they_lie_in_memory():
    """Where it sums over rows and columns of tokens, XLA for CPU first turns dy, [tokens, out], round."""
    x, weight = jnp.ones((3, 40, 32)), jnp.ones((88, 32))
    step = jax.jit(jax.grad(lambda weight: jnp.sum(jnp.sin(linear(x, weight)))))
    np.testing.assert_allclose(step(weight), 120 * np.cos(32) * np.ones((88, 32)), rtol=1e-4)
    program = step.lower(weight).compile().as_text()
    assert "f32[120,88]" in program and "f32[88,120]" not in program
