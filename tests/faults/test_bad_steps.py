"""A batch or a device that gives no numbers, or nothing to learn from, leaves every weight as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune.step as step_module
from jaxtune.parallel import local
from tests.programs import Stepper

SPLIT = {"fsdp": 2, "tensor": 2}


def run_one(stepper, batch):
    """(the state before, the metrics) of the first step."""
    before = jax.tree.map(np.asarray, stepper.state)
    placed = stepper.program.put(batch)
    stepper.state, metrics = stepper.program.train_step(stepper.state, stepper.frozen, placed, jnp.int32(1))
    return before, metrics


def assert_unchanged(stepper, before, *names):
    for name in names:
        jax.tree.map(np.testing.assert_array_equal, stepper.state[name], before[name])
    for array in jax.tree.leaves(stepper.state["trainable"]):
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(array)[shard.index])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_one_device_that_has_no_numbers_stops_the_update_on_all(monkeypatch, number):
    loss = step_module.batch_loss

    def broken(*arguments):
        return loss(*arguments) * jnp.where(local.index("fsdp") == 1, number, 1.0)

    monkeypatch.setattr(step_module, "batch_loss", broken)
    stepper = Stepper(mesh=SPLIT)
    before, metrics = run_one(stepper, stepper.batch(1))
    assert not np.isfinite(metrics["loss"]) and int(metrics["skipped"]) == int(metrics["bad_in_a_row"]) == 1
    assert_unchanged(stepper, before, "trainable", "optimizer")


def test_a_batch_with_nothing_to_learn_from_has_the_loss_0_and_no_gradient():
    stepper = Stepper(mesh=SPLIT, optim={"name": "sgd", "lr": 1.0})
    batch = {name: np.asarray(array) for name, array in stepper.batch(1).items()}
    before, metrics = run_one(stepper, {**batch, "mask": np.zeros_like(batch["mask"])})
    assert (float(metrics["loss"]), float(metrics["grad_norm"]), int(metrics["skipped"])) == (0.0, 0.0, 0)
    assert_unchanged(stepper, before, "trainable")
