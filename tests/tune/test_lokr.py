"""LoKr's factors, its product without the Kronecker product, its start, and what it refuses. The peer is peft's lokr.

Files, training and the other promises of every method are compared with peft in test_peft_methods.py.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import ops
from jaxtune.config import make_config, tune_section
from jaxtune.errors import AdapterError, ConfigError
from jaxtune.tune.lokr import Kronecker, factors
from tests.tune.support import logits, tuned

random = np.random.default_rng(0)


def draw(*shape):
    return jnp.array(random.normal(size=shape), jnp.float32)


def test_factors_are_peft_s():
    pytest.importorskip("peft")
    from peft.tuners.lokr.layer import factorization

    for size in [*range(1, 130), 896, 4864, 151936]:
        for factor in (-1, 1, 2, 3, 4, 8, 16, 500):
            assert factors(size, factor) == factorization(size, factor), (size, factor)


@pytest.mark.parametrize("whole", [True, False])
def test_the_product_is_that_of_the_kronecker_product(whole):
    base, x = draw(6, 20), draw(2, 3, 20)  # outputs 2 of 3, inputs 4 of 5
    low = {"w1_a": draw(2, 1), "w1_b": draw(1, 4), "w2_a": draw(3, 2), "w2_b": draw(2, 5)}
    first, second = low["w1_a"] @ low["w1_b"], low["w2_a"] @ low["w2_b"]
    leaf = Kronecker(base, jnp.float32(0.5), **({"w1": first, "w2": second} if whole else low))
    weight = np.asarray(base) + 0.5 * np.kron(first, second)
    np.testing.assert_allclose(ops.dense(leaf), weight, atol=1e-5)
    np.testing.assert_allclose(ops.linear(x, leaf), np.asarray(x) @ weight.T, atol=1e-4)


def first_leaf(**options):
    return tuned(tune_section(method="lokr", **options)).params["stacks"]["0"]["attention"]["q_proj"]["weight"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"rank": 2}, {"w1": (4, 4), "w2_a": (8, 2), "w2_b": (2, 8)}),
        ({"rank": 4}, {"w1": (4, 4), "w2": (8, 8)}),
        ({"rank": 1, "decompose_both": True}, {"w1_a": (4, 1), "w1_b": (1, 4), "w2_a": (8, 1), "w2_b": (1, 8)}),
        ({"rank": 2, "decompose_factor": 2}, {"w1": (2, 2), "w2_a": (16, 2), "w2_b": (2, 16)}),
    ],
    ids=str,
)
def test_a_matrix_is_low_rank_where_the_rank_is_below_half_of_its_size(options, parts):
    leaf = first_leaf(**options)
    found = {name: getattr(leaf, name) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}
    assert {name: array.shape[1:] for name, array in found.items() if array is not None} == parts


@pytest.mark.parametrize(("init", "zero", "drawn"), [("default", "w1", "w2_b"), ("lycoris", "w2_b", "w1")])
def test_one_matrix_starts_at_zero_and_nothing_changes(init, zero, drawn):
    leaf = first_leaf(rank=2, init=init)
    assert not np.any(getattr(leaf, zero))
    for name, bound in ((drawn, getattr(leaf, drawn).shape[-1] ** -0.5), ("w2_a", 2**-0.5)):
        size = np.abs(getattr(leaf, name))
        assert 0.8 * bound < size.max() <= bound
    base = tuned(tune_section(method="full"))
    made = tuned(tune_section(method="lokr", rank=2, init=init))
    np.testing.assert_array_equal(logits(made.model, made.params), logits(base.model, base.params))


def test_layers_with_matrices_of_two_kinds_are_refused_with_both_ranks():
    with pytest.raises(AdapterError) as error:
        first_leaf(rank=2, rank_pattern={"layers.1.self_attn.q_proj": 6})
    words = ["tune.rank_pattern", "ranks 2 and 6 for q_proj", "low-rank with 2 and whole with 6"]
    assert all(word in str(error.value) for word in words), str(error.value)
    assert first_leaf(rank=4, rank_pattern={"layers.1.self_attn.q_proj": 6}).w2 is not None


@pytest.mark.parametrize("factor", [0, -2])
def test_a_factor_is_positive_or_minus_one(factor):
    tree = {"model": {"path": "-"}, "data": {"path": "-"}, "tune": {"method": "lokr", "decompose_factor": factor}}
    with pytest.raises(ConfigError, match="decompose_factor: allowed are 1 to 2147483647, or -1"):
        make_config(tree)
