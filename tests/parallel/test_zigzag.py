"""Every device holds a chunk from the front and its mirror from the back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import MeshError
from jaxtune.parallel.zigzag import check_length, into_zigzag, out_of_zigzag, positions_of, unzigzag, zigzag


def test_two_devices():
    np.testing.assert_array_equal(zigzag(8, 2), [0, 1, 6, 7, 2, 3, 4, 5])


def test_one_device_keeps_the_order_of_any_length():
    for function in (zigzag, unzigzag, lambda time, parts: positions_of(0, time, parts)):
        np.testing.assert_array_equal(function(7, 1), np.arange(7))


@pytest.mark.parametrize(("time", "parts"), [(24, 2), (24, 3), (80, 8)])
def test_the_way_there_and_back(time, parts):
    steps = np.arange(time)
    np.testing.assert_array_equal(steps[zigzag(time, parts)][unzigzag(time, parts)], steps)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_causal_mask_gives_every_device_the_same_work(parts):
    seen = (zigzag(48, parts) + 1).reshape(parts, -1).sum(axis=1)
    assert len(set(seen)) == 1


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_positions_are_those_of_the_order(parts):
    order, traced = zigzag(40, parts).reshape(parts, -1), jax.jit(lambda rank: positions_of(rank, 40 // parts, parts))
    for rank in range(parts):
        positions = positions_of(rank, 40 // parts, parts)
        assert positions.dtype == jnp.int32
        np.testing.assert_array_equal(positions, order[rank])
        np.testing.assert_array_equal(traced(rank), order[rank])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_arrays_are_put_in_order_along_any_dimension(dim):
    x = np.moveaxis(np.random.default_rng(0).normal(size=(24, 2, 3)), 0, dim)
    expected = np.take(x, zigzag(24, 4), axis=dim)
    for array in (x, jnp.asarray(x)):
        np.testing.assert_array_equal(into_zigzag(array, 4, dim), expected.astype(array.dtype))
        np.testing.assert_array_equal(out_of_zigzag(into_zigzag(array, 4, dim), 4, dim), array)


def test_a_length_that_does_not_split_is_refused_with_those_that_would():
    with pytest.raises(MeshError, match=r"max_length 1000 .* 2 x mesh.context = 16.* 992 or 1008 would do"):
        check_length(1000, 8)
    with pytest.raises(MeshError, match=r"max_length 7 .* 16 would do"):
        zigzag(7, 8)
    for time in (992, 1008):
        check_length(time, 8)
