"""Programs that run once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.once import LEVEL, run_once


def times(x, by):
    return {"product": x * by}


@pytest.mark.parametrize(("flags", "options"), [("", {LEVEL: 1}), (f"--{LEVEL}=2", None)])
def test_a_result_is_in_its_shards_and_a_level_that_was_asked_for_stays(monkeypatch, flags, options):
    home = NamedSharding(jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), PartitionSpec("x"))
    given, jit = [], jax.jit
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(jax, "jit", lambda *a, **named: given.append(named["compiler_options"]) or jit(*a, **named))
    found = run_once(times, jnp.arange(4.0), shardings={"product": home}, by=3)["product"]
    np.testing.assert_array_equal(found, [0, 3, 6, 9])
    assert found.sharding.is_equivalent_to(home, 1) and given == [options]


def test_without_shards_it_is_where_its_arrays_are():
    assert run_once(times, jnp.ones(2), by=2)["product"].devices() == {jax.devices()[0]}
