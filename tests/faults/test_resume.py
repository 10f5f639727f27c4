"""A run that is cut off and typed again ends as the run that was not, bit for bit."""

import json
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import child_environment
from tools import crash_loop
from tools.crash_loop import EVERY, STEPS, Trainer, result, steps_of, write_run

SEED = 20261126
pytestmark = pytest.mark.slow


def start(config: Path, *overrides: str, devices: int = 1) -> Trainer:
    return Trainer(config, *overrides, environment=flags(devices))


def flags(devices: int = 1) -> dict[str, str]:
    return {"XLA_FLAGS": child_environment(devices)["XLA_FLAGS"]}


def stop_after(config: Path, steps: int, number: int) -> int:
    """Send a signal when the ledger has so many steps; the exit code."""
    trainer = start(config)
    trainer.wait_for(lambda: steps_of(trainer.run) >= steps)
    return trainer.send(number)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    config = write_run(tmp_path_factory.mktemp("uninterrupted"))
    start(config).finish()
    found = result(config.parent / "run")
    assert [row["step"] for row in found["ledger"]] == list(range(1, STEPS + 1))
    assert list(found["evaluations"]) == [10, 20, 30, 40]
    return found


def test_killed_at_random_moments_after_steps_and_in_saves(tmp_path, uninterrupted):
    config, told = write_run(tmp_path), []
    crash_loop.crash(config, 5, SEED, told.append, flags())
    assert len(told) == 5 and all("killed" in line for line in told), told
    assert any("into a save" in line for line in told) and any("after step" in line for line in told)
    assert crash_loop.differences(result(tmp_path / "run"), uninterrupted) == []


def test_sigterm_saves_the_step_and_exits_143(tmp_path, uninterrupted):
    config, run = write_run(tmp_path, checkpoint={"every": 1000}), tmp_path / "run"
    assert stop_after(config, 7, signal.SIGTERM) == 143
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert saved == steps_of(run) >= 7
    assert f"from the checkpoint of step {saved}" in start(config).finish()
    assert result(run) == uninterrupted


def test_on_another_mesh_the_batches_are_the_same_and_the_losses_close(tmp_path, uninterrupted):
    config, run = write_run(tmp_path), tmp_path / "run"
    stop_after(config, 10, signal.SIGKILL)
    start(config, "mesh.fsdp=1", "mesh.tensor=2", devices=2).finish()
    ledger, expected = result(run)["ledger"], uninterrupted["ledger"]
    assert [row["batch_sha256"] for row in ledger] == [row["batch_sha256"] for row in expected]
    for ours, theirs in zip(ledger, expected, strict=True):
        assert float.fromhex(ours["loss"]) == pytest.approx(float.fromhex(theirs["loss"]), rel=1e-5)


def test_a_change_that_alters_the_data_is_refused_with_the_difference_and_a_new_learning_rate_is_said(tmp_path):
    config, run = write_run(tmp_path), tmp_path / "run"
    stop_after(config, EVERY + 1, signal.SIGTERM)
    before = (run / "ledger.jsonl").read_bytes()
    refused = start(config, "train.seed=1", "tune.rank=8")
    assert refused.wait() == 2 and "Traceback" not in refused.output
    assert "train.seed" in refused.output and "tune.rank" in refused.output
    assert (run / "ledger.jsonl").read_bytes() == before
    output = start(config, "optim.lr=0.001").finish()
    assert "optim.lr" in output and "0.01" in output and "0.001" in output
    assert json.loads((run / "run.json").read_text())["config"]["optim"]["lr"] == 0.001


def test_the_same_command_after_the_end_changes_nothing(tmp_path):
    config, run = write_run(tmp_path, train={"steps": 3}), tmp_path / "run"
    start(config).finish()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert "finished" in start(config).finish()
    assert before == {path: path.read_bytes() for path in before}


def test_the_loop_ends_with_1_at_a_difference_and_says_which(tmp_path, monkeypatch, capsys, uninterrupted):
    """The runs themselves are in the tests above."""
    step = {**uninterrupted["ledger"][6], "loss": "0x1p+1"}
    other = {**uninterrupted, "ledger": [*uninterrupted["ledger"][:6], step, *uninterrupted["ledger"][7:]]}
    monkeypatch.setattr(crash_loop.Trainer, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(crash_loop.Trainer, "finish", lambda _: "")
    monkeypatch.setattr(crash_loop, "crash", lambda *_: None)
    for found, code in ((uninterrupted, 0), (other, 1)):
        monkeypatch.setattr(crash_loop, "result", partial(_told, uninterrupted, found))
        assert crash_loop.main(["--rounds", "2", "--home", str(tmp_path)]) == code
    shown = capsys.readouterr().out
    assert "2 rounds, seed 0: the same, bit for bit" in shown
    assert "DIFFERENT ledger: {'step': 7," in shown and "adapter" not in shown


def _told(whole: dict, killed: dict, run: Path) -> dict:
    return killed if run.parent.name == "killed" else whole
