"""The filters are transformers' warpers, and draws follow the distribution that they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import ConfigError
from jaxtune.sampling import Sampling, draw, top_k, top_p, warped

VOCAB = 101


def random_logits(rows=16, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32)


def peer(warper, logits):
    import torch

    return warper(None, torch.tensor(np.array(logits))).numpy()


@pytest.mark.parametrize("k", [1, 2, 50, 100, 101, 1000])
def test_top_k_keeps_what_transformers_keeps(k):
    from transformers import TopKLogitsWarper

    logits = random_logits()
    np.testing.assert_array_equal(top_k(jnp.array(logits), jnp.int32(k)), peer(TopKLogitsWarper(k), logits))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_top_p_keeps_what_transformers_keeps(p):
    from transformers import TopPLogitsWarper

    logits = random_logits(seed=1)
    np.testing.assert_array_equal(top_p(jnp.array(logits), jnp.float32(p)), peer(TopPLogitsWarper(p), logits))


def test_the_filters_together_have_transformers_order():
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits, sampling = random_logits(seed=2), Sampling(temperature=0.7, top_k=20, top_p=0.8)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8)])
    ours = warped(jnp.array(logits), sampling.knobs, sampling.kind)
    np.testing.assert_allclose(ours, peer(warpers, logits), rtol=1e-6)
    other = top_k(top_p(jnp.array(logits) / 0.7, jnp.float32(0.8)), jnp.int32(20))
    assert (np.isfinite(ours) != np.isfinite(other)).any()  # so another order would have been seen


def test_equal_logits_are_treated_as_transformers_treats_them():
    from transformers import TopKLogitsWarper

    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 7:10] = 5.0
    np.testing.assert_array_equal(top_k(jnp.array(logits), jnp.int32(2)), peer(TopKLogitsWarper(2), logits))
    assert np.isfinite(top_p(jnp.array(logits), jnp.float32(1e-6))).sum() == 1


def test_top_p_of_one_keeps_everything():
    logits = np.array([[0.0, -200.0, 1.0]], np.float32)  # the second one's probability is 0 in float32
    np.testing.assert_array_equal(top_p(jnp.array(logits), jnp.float32(1.0)), logits)


def test_a_temperature_that_float32_cannot_divide_by_takes_the_likeliest():
    logits = jnp.array(random_logits())
    for temperature in (5e-324, 1e-40, 1e-36, np.float32(1e-38)):
        sampling = Sampling(temperature=temperature, top_k=5)
        found = draw(logits, sampling.knobs, sampling.kind, jnp.int32(0))
        np.testing.assert_array_equal(found, jnp.argmax(logits, axis=-1))
    assert Sampling(temperature=np.float64(1e-20), top_k=np.int64(5), seed=np.int32(1)).kind == "filtered"


def test_temperature_zero_takes_the_likeliest():
    logits, sampling = random_logits(), Sampling()
    assert sampling.kind == "greedy"
    drawn = draw(jnp.array(logits), sampling.knobs, sampling.kind, jnp.int32(0))
    np.testing.assert_array_equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_draws_have_the_frequencies_that_the_filters_leave(settings):
    sampling = Sampling(temperature=1.5, seed=3, **settings)
    row = np.array([2.0, 1.0, 0.5, 0.0, -4.0], np.float32)
    logits = jnp.tile(row, (20_000, 1))
    drawn = draw(logits, sampling.knobs, sampling.kind, jnp.int32(0))
    expected = np.asarray(jax.nn.softmax(warped(logits[:1], sampling.knobs, sampling.kind)))[0]
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 20_000, expected, atol=0.015)
    assert (np.bincount(drawn, minlength=5)[expected == 0] == 0).all()


def test_a_draw_depends_on_seed_and_count_and_not_on_the_number_of_rows():
    logits = jnp.array(random_logits(rows=32))

    def drawn(rows, seed=0, count=0):
        sampling = Sampling(temperature=1.0, seed=seed)
        return draw(logits[:rows], sampling.knobs, sampling.kind, jnp.int32(count)).tolist()

    assert drawn(32)[:4] == drawn(4)
    assert drawn(32) == drawn(32)
    assert drawn(32) != drawn(32, seed=1)
    assert drawn(32) != drawn(32, count=1)


def test_equal_rows_draw_differently():
    sampling = Sampling(temperature=1.0)
    drawn = draw(jnp.zeros((16, VOCAB)), sampling.knobs, sampling.kind, jnp.int32(0))
    assert len(set(drawn.tolist())) > 8


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": 1, "top_k": 0}, "top_k 0"),
        ({"temperature": 1, "top_p": 0.0}, "top_p 0"),
        ({"temperature": 1, "top_p": 1.5}, "top_p 1.5"),
        ({"temperature": 1, "seed": -1}, "seed -1"),
        ({"temperature": None}, "temperature None; allowed: a number, 0 or more"),
        ({"temperature": "1"}, "temperature '1'; allowed: a number"),
        ({"temperature": 1, "top_k": 2.5}, "top_k 2.5; allowed: a whole number, 1 or more"),
        ({"temperature": 1, "top_p": "x"}, "top_p 'x'"),
        ({"temperature": 1, "seed": 1.5}, "seed 1.5; allowed: a whole number"),
        ({"temperature": 1, "seed": None}, "seed None"),
        ({"temperature": 1, "seed": True}, "seed True"),
        ({"top_k": 5}, "do nothing at temperature 0"),
        ({"top_p": 0.5}, "do nothing at temperature 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, name):
    with pytest.raises(ConfigError, match=name):
        Sampling(**settings)
