"""Every method gives one device's losses and numbers on every mesh, and moves what it should move alone."""

import jax
import numpy as np
import pytest

from tests.programs import Stepper

# name -> the section's options
METHODS = {
    "ia3": {"method": "ia3", "targets": "all-linear"},
    "oft": {"method": "oft", "targets": "all-linear", "oft_block_size": 16},
    "oft, exact, with dropout": {
        "method": "oft",
        "targets": ["q_proj", "down_proj"],
        "oft_block_size": 16,
        "use_cayley_neumann": False,
        "module_dropout": 0.25,
    },
    "vera": {"method": "vera", "targets": "all-linear", "rank": 8, "dropout": 0.1},
    "loha": {"method": "loha", "targets": "all-linear", "rank": 2},
    "lokr": {"method": "lokr", "targets": "all-linear", "rank": 2},
    "lokr between groups that the mesh cuts": {
        "method": "lokr",
        "targets": ["k_proj", "down_proj", "gate_proj"],
        "rank": 2,
        "decompose_factor": 1,
    },
}
MESHES = {
    "fsdp 2, tensor 2, pipe 2": {
        "mesh": {"fsdp": 2, "tensor": 2, "pipe": 2, "sequence_parallel": True},
        "train": {"micro_batches": 4},
    },
    "fsdp 2, tensor 2, context 2, remat block": {
        "mesh": {"fsdp": 2, "tensor": 2, "context": 2},
        "memory": {"remat": "block"},
    },
}
STEPS = 4
# A larger epsilon: Adam turns a gradient that is nothing but rounding into whole steps.
OPTIM = {"lr": 1e-2, "eps": 1e-5, "warmup": 0, "schedule": "constant"}

_expected: dict[str, tuple] = {}


def stepper(name, mesh, train=None, **rest):
    return Stepper(tune=METHODS[name], mesh=mesh, train={"batch_size": 8, **(train or {})}, optim=OPTIM, rows=8, **rest)


def one_device(name):
    if name not in _expected:
        alone = stepper(name, {"fsdp": 1})
        before = alone.frozen
        losses = alone.run(STEPS)
        assert losses[-1] < losses[0]
        jax.tree.map(np.testing.assert_array_equal, alone.frozen, before)
        _expected[name] = losses, alone.weights()
    return _expected[name]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", METHODS)
def test_a_mesh_changes_nothing(name, mesh):
    expected_losses, expected = one_device(name)
    there = stepper(name, **MESHES[mesh])
    np.testing.assert_allclose(there.run(STEPS), expected_losses, atol=2e-5)
    found = there.weights()
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], atol=1e-4, err_msg=key)
