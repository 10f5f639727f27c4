"""Estimates: exact where shapes decide, and in the right order elsewhere."""

import pytest

from jaxtune.config import AXES
from jaxtune.plan.estimate import Facts, Shares, estimate, span_of
from jaxtune.plan.memory import DEVICE, tree_bytes
from jaxtune.plan.target import GENERIC
from tests.plan.shapes import SMALL, config, step_of

MESHES = {
    "fsdp": {"fsdp": 8},
    "zero-1": {"fsdp": 4, "zero": 1},
    "zero-2": {"fsdp": 4, "zero": 2, "data": 2},
    "tensor": {"fsdp": 2, "tensor": 4},
    "pipe": {"pipe": 2, "fsdp": 2, "tensor": 2},
}


def guess(**sections):
    settings = config(**sections)
    return estimate(FACTS, settings, settings.mesh.sizes, GENERIC)


FACTS = Facts(step_of(config()))
LORA = Facts(step_of(config(tune={"method": "lora", "rank": 4, "targets": "all-linear"})))


@pytest.mark.parametrize("facts", [FACTS, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", MESHES)
def test_weights_gradients_and_moments_are_those_of_the_step(name, facts):
    settings = facts.step.config.model_copy(
        update={"mesh": config(mesh=MESHES[name]).mesh, "train": config(train={"micro_batches": 2}).train}
    )
    step = step_of(settings)
    held = facts.held(settings.mesh.sizes, settings.mesh.zero)
    state = step.program.state
    assert held.bytes == (tree_bytes(state["trainable"]) + tree_bytes(step.program.frozen))[DEVICE]
    assert held.grads * 4 == step.gradients[DEVICE]
    assert held.moments * facts.moment_bytes == pytest.approx(tree_bytes(state["optimizer"])[DEVICE], abs=64)


def test_less_is_kept_from_remat_policy_to_remat_policy():
    kept = [
        Shares(config(memory={"remat": remat}), dict.fromkeys(AXES, 1), SMALL).kept
        for remat in ("none", "dots", "block", "full")
    ]
    assert kept[0] > kept[1] > kept[2] >= kept[3]


def test_what_saves_memory_costs_time():
    plain, block = guess(memory={"remat": "none"}), guess(memory={"remat": "block"})
    assert block.temporaries < plain.temporaries and block.compute > plain.compute
    away = guess(memory={"offload": ["optimizer"]})
    assert away.held < guess().held and away.host > guess().host == 0


def test_more_micro_batches_need_less_and_send_weights_more_often():
    mesh = {"fsdp": 4}
    one, four = guess(mesh=mesh), guess(mesh=mesh, train={"micro_batches": 4})
    assert four.temporaries < one.temporaries and four.network > one.network


def test_a_pipeline_waits():
    one = guess(train={"micro_batches": 4}, mesh={"fsdp": 2})
    two = guess(train={"micro_batches": 4}, mesh={"pipe": 2})
    assert two.compute > one.compute


def test_inner_axes_reach_near_neighbours():
    sizes = dict(zip(AXES, (2, 1, 4, 1, 8), strict=True))
    assert [span_of(axis, sizes) for axis in ("pipe", "fsdp", "tensor")] == [64, 32, 8]
    assert GENERIC.bandwidth(8) > GENERIC.bandwidth(16)
