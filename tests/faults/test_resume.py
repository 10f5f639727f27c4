"""A run that is cut off and typed again ends as the run that was not, bit for bit."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import child_environment
from tests.peer import read_jsonl
from tests.runs import sections, write_config

STEPS = 40
SEED = 20261123
pytestmark = pytest.mark.slow


def configuration(model: Path, home: Path, **more) -> Path:
    """LoRA with dropout, packing, a cosine schedule and evaluations: whatever could go out of step."""
    tune = {"method": "lora", "rank": 4, "dropout": 0.1, "targets": "all-linear"}
    settings = {
        "train": {"batch_size": 2, "micro_batches": 2},
        "optim": {"schedule": "cosine", "warmup": 0.1},
        "checkpoint": {"every": 3},
        "eval": {"fraction": 0.1, "every": 10},
        "mesh": {"data": 1, "fsdp": 1},
    }
    return write_config(home / "config.yaml", sections(model, home, steps=STEPS, tune=tune, **settings | more))


def start(config: Path, *overrides: str, devices: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxtune.train", "--config", str(config), *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=child_environment(devices), **pipes)


def finish(config: Path, *overrides: str, devices: int = 1) -> str:
    process = start(config, *overrides, devices=devices)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_when(process: subprocess.Popen, run: Path, steps: int, number: int, delay: float = 0.0) -> int:
    """Send a signal `delay` seconds after the ledger has so many steps; the exit code."""
    while lines(run / "ledger.jsonl") < steps and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay)
    assert process.poll() is None, process.stdout.read()
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode


def result(run: Path) -> tuple[list[dict], bytes, list[float]]:
    """What must be equal: the ledger, the adapter's bytes, the evaluations."""
    evaluations = [row["eval_loss"] for row in read_jsonl(run / "metrics.jsonl") if "eval_loss" in row]
    return read_jsonl(run / "ledger.jsonl"), (run / "adapter/adapter_model.safetensors").read_bytes(), evaluations


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen2")


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    home = tmp_path_factory.mktemp("uninterrupted")
    finish(configuration(model, home))
    ledger, adapter, evaluations = result(home / "run")
    assert [row["step"] for row in ledger] == list(range(1, STEPS + 1))
    assert len(evaluations) == STEPS // 10
    return ledger, adapter, evaluations


def test_killed_at_five_random_moments(model, tmp_path, uninterrupted):
    config, run = configuration(model, tmp_path), tmp_path / "run"
    draw = random.Random(SEED)
    for _ in range(5):
        # The steps that a start goes back to are repeated, so each kill comes later than the one before.
        steps = min(lines(run / "ledger.jsonl") + draw.randrange(1, 7), STEPS - 2)
        assert kill_when(start(config), run, steps, signal.SIGKILL, draw.uniform(0, 0.05)) == -signal.SIGKILL
        assert not (run / "adapter").exists()
    finish(config)
    assert result(run) == uninterrupted


def test_sigterm_saves_the_step_and_exits_143(model, tmp_path, uninterrupted):
    config, run = configuration(model, tmp_path, checkpoint={"every": 1000}), tmp_path / "run"
    assert kill_when(start(config), run, 7, signal.SIGTERM) == 143
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert saved == lines(run / "ledger.jsonl") >= 7
    assert f"from the checkpoint of step {saved}" in finish(config)
    assert result(run) == uninterrupted


def test_on_another_mesh_the_batches_are_the_same_and_the_losses_close(model, tmp_path, uninterrupted):
    config, run = configuration(model, tmp_path), tmp_path / "run"
    kill_when(start(config), run, 10, signal.SIGKILL)
    finish(config, "mesh.fsdp=1", "mesh.tensor=2", devices=2)
    ledger, expected = read_jsonl(run / "ledger.jsonl"), uninterrupted[0]
    assert [row["batch_sha256"] for row in ledger] == [row["batch_sha256"] for row in expected]
    for ours, theirs in zip(ledger, expected, strict=True):
        assert float.fromhex(ours["loss"]) == pytest.approx(float.fromhex(theirs["loss"]), rel=1e-5)


def test_a_change_that_alters_the_data_is_refused_with_the_difference(model, tmp_path):
    config, run = configuration(model, tmp_path), tmp_path / "run"
    kill_when(start(config), run, 4, signal.SIGTERM)
    before = (run / "ledger.jsonl").read_bytes()
    process = start(config, "train.seed=1", "tune.rank=8")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in output
    assert "train.seed" in output and "tune.rank" in output
    assert (run / "ledger.jsonl").read_bytes() == before


def test_a_new_learning_rate_is_allowed_and_said(model, tmp_path):
    config, run = configuration(model, tmp_path), tmp_path / "run"
    kill_when(start(config), run, 4, signal.SIGTERM)
    output = finish(config, "optim.lr=0.001")
    assert "optim.lr" in output and "0.01" in output and "0.001" in output
    assert json.loads((run / "run.json").read_text())["config"]["optim"]["lr"] == 0.001


def test_the_same_command_after_the_end_changes_nothing(model, tmp_path):
    config, run = configuration(model, tmp_path, train={"steps": 3, "batch_size": 2}), tmp_path / "run"
    finish(config)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert "finished" in finish(config)
    assert before == {path: path.read_bytes() for path in before}
