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
    assert abs((found == 0).mean() - rate) < 5 * deviation
    assert len({row.tobytes() for row in found}) == TOKENS


def kept(seed, rate, tokens=TOKENS, features=FEATURES, folded=()):
    """1 where a number is kept, else 0, less the mean of that and over its deviation."""
    noise = Noise(jax.random.key(seed), jnp.arange(tokens))
    for number in folded:
        noise = noise.fold_in(number)
    found = np.asarray(dropout(jnp.ones((tokens, features)), rate, noise)) > 0
    return (found - (1 - rate)) / np.sqrt(rate * (1 - rate))


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_what_is_dropped_has_nothing_to_do_with_a_neighbour_or_another_key(rate):
    drawn = kept(1, rate, tokens=1024)
    pairs = {"other key": (drawn, kept(2, rate, tokens=1024))}
    for step in (1, 2, 3, 16, 64, 256):
        pairs |= {f"token + {step}": (drawn[step:], drawn[:-step])}
        pairs |= {f"feature + {step}": (drawn[:, step:], drawn[:, :-step])}
        pairs |= {f"both + {step}": (drawn[step:, step:], drawn[:-step, :-step])}
    found = {name: (a * b).mean() * np.sqrt(a.size) for name, (a, b) in pairs.items()}
    assert max(map(abs, found.values())) < 5, found
    for axis in (0, 1):  # a share that is too even, or not even enough, over the tokens or over the features
        sums = drawn.mean(axis) * np.sqrt(drawn.shape[axis])
        assert abs(sums.var() - 1) < 5 * np.sqrt(2 / len(sums)), axis


def test_what_is_folded_in_makes_keys_that_have_nothing_to_do_with_one_another():
    """Layers, their parts and their parts' parts, in 0 to 27 and so on: each pair's draws, and how many bits differ."""
    ways = [(), *((n,) for n in range(28)), *((n, m) for n in (0, 1, 27) for m in range(4))]
    ways += [(n, m, o) for n in (0, 1) for m in (0, 1) for o in (0, 1, 2)]
    drawn = np.stack([kept(1, 0.5, tokens=64, features=512, folded=way).ravel() for way in ways])
    products = drawn @ drawn.T / np.sqrt(drawn.shape[1])
    others = products[np.triu_indices(len(ways), 1)]
    assert np.abs(others).max() < 5.5 and abs(others.var() - 1) < 5 * np.sqrt(2 / len(others))
    noise = Noise(jax.random.key(0), jnp.arange(2))
    words = np.stack([np.asarray(jax.random.key_data(noise.fold_in(n).key)) for n in range(200)])
    assert len({tuple(pair) for pair in words.tolist()}) == 200 and not np.any(words[:, 0] == words[:, 1])
    bits = np.unpackbits((words[1:] ^ words[:-1]).view(np.uint8), axis=1).mean()
    assert abs(bits - 0.5) < 5 * 0.5 / np.sqrt(words[1:].size * 32)


@pytest.mark.parametrize("rate", [1 - 1e-4, 1 - 1e-12])
def test_nearly_all_may_be_dropped(rate):
    noise = Noise(jax.random.key(0), jnp.arange(TOKENS))
    found = np.asarray(dropout(jnp.ones((TOKENS, FEATURES)), rate, noise))
    expected = found.size * (1 - rate)
    assert np.isfinite(found).all() and abs((found != 0).sum() - expected) < 5 * np.sqrt(expected) + 1


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
