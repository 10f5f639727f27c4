"""Every method gives one device's losses and numbers on every mesh, and moves what it should move alone."""

import jax
import numpy as np
import pytest

from tests.programs import Stepper

# name -> the section's options
METHODS = {
    "adalora": {
        "method": "adalora",
        "init_r": 4,
        "target_r": 3,
        "tfinal": 7,
        "total_step": 10,
        "targets": ["q_proj", "o_proj", "up_proj"],
        "layers": [1, 2, 3],
    },
    "pissa": {"method": "pissa", "rank": 4, "targets": "all-linear", "layers": [1, 2, 3]},
    "dora": {"method": "dora", "rank": 4, "dropout": 0.1, "targets": ["q_proj", "o_proj", "up_proj", "embed_tokens"]},
    "ia3": {"method": "ia3", "targets": "all-linear"},
    "prompt": {"method": "prompt", "num_virtual_tokens": 4, "prompt_tuning_init": "SAMPLE_VOCAB"},
    "P-tuning, LSTM, dropout": {
        "method": "p_tuning",
        "num_virtual_tokens": 4,
        "encoder_reparameterization_type": "LSTM",
        "encoder_dropout": 0.2,
    },
    "prefix": {"method": "prefix", "num_virtual_tokens": 4},
    "prefix with a projection": {"method": "prefix", "num_virtual_tokens": 4, "prefix_projection": True},
    "oft": {"method": "oft", "targets": "all-linear", "oft_block_size": 16},
    "oft, exact, with dropout": {
        "method": "oft",
        "targets": ["q_proj", "down_proj"],
        "oft_block_size": 16,
        "use_cayley_neumann": False,
        "module_dropout": 0.25,
    },
    "vera": {"method": "vera", "targets": "all-linear", "rank": 8, "dropout": 0.1},
    "layernorm": {"method": "layernorm", "exclude": ["model.layers.2.input_layernorm"]},
    "bitfit": {"method": "bitfit"},
    "houlsby": {"method": "houlsby", "scaling": "learned", "dropout": 0.1, "leave_out": [1]},
    "parallel": {"method": "parallel", "reduction_factor": 5},
    "trainable tokens": {"method": "trainable_tokens", "token_indices": [3, 300, 511, 17]},
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
        before, start = alone.frozen, jax.tree.map(np.array, alone.weights())
        losses = alone.run(STEPS)
        jax.tree.map(np.testing.assert_array_equal, alone.frozen, before)
        assert all(np.any(array != start[key]) for key, array in alone.weights().items())
        _expected[name] = losses, alone.weights()
    return _expected[name]


# One method of each way in which a method touches the model, in every run of the suite.
OFTEN = {"dora", "ia3", "oft", "vera", "prompt", "prefix", "houlsby", "trainable tokens"}
FIRST, _ = MESHES
CASES = [
    pytest.param(name, mesh, marks=[] if name in OFTEN and mesh == FIRST else pytest.mark.thorough)
    for name in METHODS
    for mesh in MESHES
]


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_mesh_changes_nothing(name, mesh):
    expected_losses, expected = one_device(name)
    there = stepper(name, **MESHES[mesh])
    np.testing.assert_allclose(there.run(STEPS), expected_losses, atol=2e-5)
    found = there.weights()
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], atol=1e-4, err_msg=key)


def test_under_adafactor_a_layer_s_step_depends_on_no_other_layer_s_rank():
    def moved(mesh, **options):
        tune = {"method": "lora", "rank": 2, "targets": ["q_proj"], **options}
        train, optim = {"batch_size": 8, "micro_batches": 2}, {"name": "adafactor"}
        there = Stepper(tune=tune, mesh=mesh, train=train, optim=optim, rows=8)
        start = jax.tree.map(np.array, there.weights())
        there.run(3)
        return {key: array[..., :2] - start[key][..., :2] for key, array in there.weights().items() if key[-2:] == ".a"}

    options = {"rank_pattern": {"layers.1.self_attn.q_proj": 16}, "alpha_pattern": {"layers.1.self_attn.q_proj": 128}}
    alone = moved({"fsdp": 1})
    beside = moved({"pipe": 2, "virtual_stages": 2, "schedule": "interleaved"}, **options)
    for key in alone.keys() - {"model.layers.1.self_attn.q_proj.weight.a"}:
        assert np.linalg.norm(beside[key]) == pytest.approx(np.linalg.norm(alone[key]), rel=0.02)
