"""Sums in parts between CPU processes: gloo's own reduce-scatter, which adds up wrongly, is never taken."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxtune.errors import MeshError
from jaxtune.parallel import local
from tests.programs import Stepper

MESHES = {
    "gradients in parts": {"mesh": {"fsdp": 2, "zero": 2}, "train": {"micro_batches": 2}},
    "weights and sequences in parts, in stages": {
        "mesh": {"fsdp": 2, "tensor": 2, "sequence_parallel": True, "pipe": 2},
        "train": {"micro_batches": 2},
    },
}


@pytest.fixture
def gloo(monkeypatch):
    monkeypatch.setattr(local, "by_gloo", lambda: True)


def results(dim):
    """(the sum's parts, the gradient of gathered parts) on four devices."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    whole = jnp.asarray(np.random.default_rng(0).standard_normal((8, 12, 4)), jnp.float32)

    def parts(x):
        own = x * (1 + local.index("fsdp"))
        weights = jnp.cos(local.gathered(own, "fsdp", dim))
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(local.gathered(x, "fsdp", dim)) * weights))(own)
        return local.scattered(own, "fsdp", dim), gradient

    split = PartitionSpec(*[None] * dim, "fsdp")
    return jax.jit(local.run(parts, mesh, PartitionSpec(), (split, split)))(whole)


@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_exchanged_and_added_up_is_the_sum_in_parts(dim, monkeypatch):
    expected = results(dim)
    monkeypatch.setattr(local, "by_gloo", lambda: True)
    for ours, theirs in zip(results(dim), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES)
def test_between_cpu_processes_no_step_has_a_reduce_scatter(mesh, gloo):
    stepper = Stepper(**MESHES[mesh])
    assert " all-to-all(" in stepper.hlo
    local.check_sums(stepper.compiled)


def test_a_reduce_scatter_between_cpu_processes_is_refused(gloo):
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    scatter = partial(jax.lax.psum_scatter, axis_name="fsdp", tiled=True)
    function = jax.jit(local.run(scatter, mesh, PartitionSpec(), PartitionSpec("fsdp")))
    with pytest.raises(MeshError, match="wrong sums now and then"):
        local.check_sums(function.lower(jnp.ones(4)).compile())
