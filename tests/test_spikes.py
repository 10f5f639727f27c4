"""A loss far above the last good ones is not learnt from, and a run that goes on judges as one that was not cut off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune.step as step_module
from jaxtune import spikes
from jaxtune.config import make_config
from jaxtune.errors import TrainingStopped
from jaxtune.loop import train
from tests.peer import read_jsonl
from tests.programs import Stepper
from tests.runs import sections, stopped_after

advance, is_spike = jax.jit(spikes.advance), jax.jit(spikes.is_spike)


def filled(losses):
    window = spikes.init()
    for loss in losses:
        window = advance(window, jnp.float32(loss), True)
    return window


@pytest.mark.parametrize("count", [spikes.LEAST, spikes.WINDOW, spikes.WINDOW + 50])
def test_a_spike_is_above_mean_and_sigmas_of_the_last_good_losses(count):
    losses = np.random.default_rng(count).normal(3, 0.5, count)
    last = losses[-spikes.WINDOW :]
    limit = last.mean() + 6 * last.std()
    window = filled(losses)
    assert not is_spike(window, jnp.float32(limit - 0.01), 6.0)
    assert is_spike(window, jnp.float32(limit + 0.01), 6.0)
    assert not is_spike(window, jnp.float32(jnp.nan), 6.0)


def test_nothing_is_judged_before_there_are_enough():
    window = filled([1.0] * (spikes.LEAST - 1))
    assert not is_spike(window, jnp.float32(1000), 6.0)
    assert is_spike(advance(window, jnp.float32(1), True), jnp.float32(1000), 6.0)


def test_a_loss_that_was_not_applied_is_not_remembered():
    window = filled([1.0, 2.0])
    for loss in (jnp.nan, 1000.0):
        after = advance(window, jnp.float32(loss), False)
        jax.tree.map(np.testing.assert_array_equal, after, window)


@pytest.fixture
def spiking(monkeypatch):
    """spiking(*steps): the loss and gradients of these steps are twenty times what they are."""

    def at(*steps):
        make = step_module.make_gradients

        def broken(*arguments):
            gradients = make(*arguments)

            def scaled(trainable, frozen, batch, step, *rest):
                loss, grads, sizes = gradients(trainable, frozen, batch, step, *rest)
                factor = jnp.where(jnp.isin(step, jnp.array(steps)), 20.0, 1.0)
                return loss * factor, jax.tree.map(lambda x: x * factor.astype(x.dtype), grads), sizes

            return scaled

        monkeypatch.setattr(step_module, "make_gradients", broken)

    return at


@pytest.mark.parametrize("mesh", [{"fsdp": 1}, {"fsdp": 2, "tensor": 2}], ids=["one device", "four"])
def test_a_spike_changes_no_bit_of_weights_and_optimiser_on_any_device(spiking, mesh):
    spiking(18)
    stepper = Stepper(mesh=mesh, train={"skip_spikes": 6.0}, optim={"lr": 1e-4})
    stepper.run(17)
    before = jax.tree.map(np.asarray, stepper.state)
    stepper.run(1, first=18)
    for name in ("trainable", "optimizer", "spikes"):
        jax.tree.map(np.testing.assert_array_equal, stepper.state[name], before[name])
    for array in jax.tree.leaves(stepper.state["trainable"]):
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(array)[shard.index])
    assert (int(stepper.state["guard"]["skipped"]), int(stepper.state["guard"]["bad_in_a_row"])) == (1, 1)
    stepper.run(1, first=19)
    assert int(stepper.state["guard"]["bad_in_a_row"]) == 0 and int(stepper.state["spikes"]["count"]) == 18


def test_without_the_option_a_spike_is_learnt_from(spiking):
    spiking(18)
    stepper = Stepper(optim={"lr": 1e-4})
    stepper.run(18)
    assert int(stepper.state["guard"]["skipped"]) == 0 and int(stepper.state["spikes"]["count"]) == 18


def config(model, home, **train_section):
    tree = sections(model, home, steps=24, train={"skip_spikes": 6.0, **train_section}, optim={"lr": 1e-3})
    return make_config(tree)


def test_a_run_cut_off_after_a_spike_goes_on_as_one_that_was_not(tiny_model, tmp_path, spiking, capsys):
    spiking(18, 22)
    model = tiny_model("qwen2")
    rows = train(config(model, tmp_path / "whole"))
    assert [row["bad_steps"] for row in rows] == [0] * 17 + [1] * 4 + [2] * 3
    assert "step 18: loss" in (shown := capsys.readouterr().out)
    assert "more than 6.0 sigmas above the last ones" in shown
    with pytest.raises(SystemExit):
        stopped_after(19, config(model, tmp_path / "cut"))
    train(config(model, tmp_path / "cut"))
    ledgers = [read_jsonl(tmp_path / name / "run" / "ledger.jsonl") for name in ("cut", "whole")]
    assert ledgers[0] == ledgers[1]


def test_a_loss_that_stays_high_ends_the_run_with_what_to_do(tiny_model, tmp_path, spiking):
    spiking(*range(18, 25))
    with pytest.raises(
        TrainingStopped, match=r"3 steps in a row had a loss that is a spike.*after step 17\. .*skip_spi"
    ):
        train(config(tiny_model("qwen2"), tmp_path, max_bad_steps=3))
