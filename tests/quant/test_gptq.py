"""GPTQ against AutoGPTQ 0.7.1's own class, whose results on `inputs` and `before` are in `files/`."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtune.quant.gptq import Rounded, gptq, round_to_nearest

FILES = Path(__file__).parent / "files"
SEARCHES = {  # bits, symmetric, inputs of a group, act-order: make_tool_files.py's
    "b4": (4, True, 32, False),
    "b4_act_order": (4, True, 32, True),
    "b3_asymmetric": (3, False, 32, False),
    "b2_one_group": (2, True, 96, True),
}


@pytest.fixture(scope="module")
def peer() -> dict[str, np.ndarray]:
    return load_file(FILES / "auto_gptq_itself.safetensors")


def searched(peer, case: str, **changes) -> Rounded:
    bits, symmetric, group, act_order = SEARCHES[case]
    inputs = peer["inputs"]
    settings = {"bits": bits, "group": group, "symmetric": symmetric, "act_order": act_order, "dtype": jnp.float32}
    return gptq(jnp.asarray(peer["before"]), jnp.asarray(inputs.T @ inputs), 0.01, **settings | changes)


def dense(found: Rounded) -> np.ndarray:
    scales, zeros = (np.asarray(x, np.float32)[:, found.groups] for x in (found.scales, found.zeros))
    return scales * (np.asarray(found.codes, np.float32) - zeros)


@pytest.mark.parametrize("case", SEARCHES)
def test_the_weight_is_the_one_that_autogptq_finds(peer, case):
    found = searched(peer, case)
    np.testing.assert_array_equal(found.groups, peer[f"{case}.g_idx"])
    np.testing.assert_allclose(found.scales, peer[f"{case}.scales"], rtol=1e-4)
    # A number on the edge between two codes may fall to either side.
    same = np.isclose(dense(found), peer[f"{case}.weight"], rtol=1e-3, atol=1e-4)
    assert same.mean() > 0.999, same.mean()


def error(peer, found: Rounded) -> float:
    return float(np.square(peer["inputs"] @ (dense(found) - peer["before"]).T).mean())


@pytest.mark.parametrize("case", SEARCHES)
def test_the_outputs_move_less_than_with_rounding_to_the_same_grid(peer, case):
    bits, symmetric, group, _ = SEARCHES[case]
    rounded = round_to_nearest(jnp.asarray(peer["before"]), bits=bits, group=group, symmetric=symmetric)
    assert error(peer, searched(peer, case)) < 0.7 * error(peer, rounded)


def test_rounding_takes_the_nearest_point_of_each_groups_grid():
    weight = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    found = round_to_nearest(jnp.asarray(weight), bits=4, group=4)  # the last group has 2 inputs
    assert found.scales.shape == (4, 3)
    assert found.scales.dtype == jnp.float16
    for start in (0, 4, 8):
        part = weight[:, start : start + 4]
        scale = (2 * np.abs(part).max(1) / 15).astype(np.float16).astype(np.float32)
        points = scale[:, None] * (np.arange(16) - 8)
        nearest = np.abs(part[..., None] - points[:, None]).min(-1)
        np.testing.assert_allclose(np.abs(dense(found)[:, start : start + 4] - part), nearest, atol=1e-6)


def test_a_group_of_zeros_is_zeros():
    found = round_to_nearest(jnp.zeros((2, 8)), bits=3, group=4, symmetric=False)
    assert not dense(found).any()
    found = gptq(jnp.zeros((2, 8)), jnp.eye(8), 0.01, bits=3, group=4)
    assert not dense(found).any()


def test_no_zero_is_0_so_that_every_reader_of_v1_agrees(peer):
    """A stored zero of 2^bits - 1 is read as 0 by some kernels and as 2^bits by others."""
    weight = jnp.asarray(np.abs(peer["before"]))
    assert int(round_to_nearest(weight, bits=4, group=32, symmetric=False).zeros.min()) == 1


def test_a_hessian_that_is_not_positive_definite_is_told_by_nan_scales(peer):
    found = gptq(jnp.asarray(peer["before"]), -jnp.eye(96), 0.01, bits=4, group=32)
    assert np.isnan(found.scales).all()
