"""A run in two processes is the run in one; it survives the death of either; it stops and fails as one.

The processes have gloo between them, and two or four fake devices each. Two processes and one agree but for the
order of additions (gloo's and XLA's own reductions associate differently); the same processes again agree in every bit.
"""

import os
import shutil
import signal
import time

import pytest

from tests.multiprocess.support import (
    HEARTBEAT,
    STEPS,
    by_hand,
    children,
    configuration,
    finish,
    result,
    saved_steps,
    script,
    single,
    start,
    wait_for_steps,
)
from tests.runs import unfinish

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen2")


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    """The run directory of two processes with two devices each."""
    home = tmp_path_factory.mktemp("uninterrupted")
    code, output = finish(start(configuration(model, home)))
    assert code == 0, output
    ledger, _, evaluations = result(home / "run")
    assert [row["step"] for row in ledger] == list(range(1, STEPS + 1))
    assert len(evaluations) == 2
    return home / "run"


def assert_close(ledger, expected):
    """The same batches, and losses that differ by rounding."""
    assert [row["batch_sha256"] for row in ledger] == [row["batch_sha256"] for row in expected]
    for ours, theirs in zip(ledger, expected, strict=True):
        for name, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5)):
            assert float.fromhex(ours[name]) == pytest.approx(float.fromhex(theirs[name]), rel=tolerance)


DIES_IN_SAVE = """
import os, signal
from jaxtune.checkpoint import Checkpointer
finish = Checkpointer._finish
def die(self, step, *rest):
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(self, step, *rest)
Checkpointer._finish = die
"""


def test_a_save_that_one_process_did_not_live_to_finish_is_none(model, tmp_path, uninterrupted):
    config, run = configuration(model, tmp_path), tmp_path / "run"
    first, second = [finish(process) for process in by_hand(script(config), script(config, fault=DIES_IN_SAVE))]
    assert second[0] == -signal.SIGKILL
    assert first[0] == 75 and "Process 1 of 2 is gone: nothing was heard of it for 10 s" in first[1]
    assert saved_steps(run) == [3]
    code, output = finish(start(config))
    assert code == 0 and "from the checkpoint of step 3" in output, output
    assert result(run) == result(uninterrupted)


def test_what_two_save_one_restores_bit_for_bit_and_the_other_way_round(model, tmp_path, uninterrupted):
    # A run that is complete but for its result has nothing left to do but to restore the last state and to write it.
    two, one = tmp_path / "two", tmp_path / "one"
    shutil.copytree(uninterrupted.parent, two)
    unfinish(two / "run")
    moved = f"train.output_dir={two / 'run'}"
    code, output = single(uninterrupted.parent / "config.yaml", moved, "mesh.data=1", devices=1)
    assert code == 0 and f"from the checkpoint of step {STEPS}" in output, output
    assert result(two / "run") == result(uninterrupted)

    config = configuration(model, one)
    assert single(config, devices=4)[0] == 0
    before = result(one / "run")
    assert_close(before[0], result(uninterrupted)[0])
    unfinish(one / "run")
    code, output = finish(start(config))
    assert code == 0 and f"from the checkpoint of step {STEPS}" in output, output
    assert result(one / "run") == before


def test_sigterm_to_one_stops_both_at_the_same_saved_step(model, tmp_path, uninterrupted):
    config, run = configuration(model, tmp_path, checkpoint={"every": 1000}), tmp_path / "run"
    launcher = start(config)
    wait_for_steps(launcher, run, 3)
    os.kill(children(launcher)[1], signal.SIGTERM)
    code, output = finish(launcher)
    assert code == 143, output
    [saved] = saved_steps(run)
    assert 3 <= saved < STEPS
    assert f"Stopped after step {saved}, which is saved" in output
    # On from there in one process, with the same losses but for rounding.
    code, output = single(config, devices=4)
    assert code == 0 and f"from the checkpoint of step {saved}" in output, output
    ledger, expected = result(run)[0], result(uninterrupted)[0]
    assert ledger[:saved] == expected[:saved]
    assert_close(ledger, expected)


@pytest.mark.thorough
def test_two_processes_with_four_devices_are_one_with_eight(model, tmp_path):
    two, one = (tmp_path / name for name in ("two", "one"))
    code, output = finish(start(configuration(model, two), devices=4))
    assert code == 0, output
    assert output.count("step 1/9") == 1, "the first process alone prints"
    assert single(configuration(model, one), devices=8)[0] == 0
    assert_close(result(two / "run")[0], result(one / "run")[0])
    assert result(two / "run")[2] == pytest.approx(result(one / "run")[2], rel=1e-6)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_ends_and_all_go_on_bit_for_bit(model, tmp_path, uninterrupted, victim):
    config, run = configuration(model, tmp_path), tmp_path / "run"
    launcher = start(config)
    wait_for_steps(launcher, run, 5)
    killed = time.monotonic()
    os.kill(children(launcher)[victim], signal.SIGKILL)
    code, output = finish(launcher)
    assert time.monotonic() - killed < HEARTBEAT + 8
    assert code == 128 + signal.SIGKILL, output
    assert f"Process {victim} of 2 was killed by SIGKILL" in output
    assert f"Process {victim} of 2 is gone" in output or victim == 0
    assert saved_steps(run) == [3] and not (run / "adapter").exists()
    if victim == 0:
        return  # what is left is the same
    code, output = finish(start(config))
    assert code == 0 and "from the checkpoint of step 3" in output
    assert result(run) == result(uninterrupted)
