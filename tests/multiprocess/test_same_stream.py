"""Real data out of three sources by weight, packed: the same batches on any number of devices and processes, whatever
was killed on the way."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.conftest import child_environment
from tests.multiprocess import support
from tests.peer import read_jsonl
from tests.runs import write_config
from tools.crash_loop import MODEL, Trainer

STEPS, EVERY = 7, 2
pytestmark = [pytest.mark.slow, pytest.mark.real]


@pytest.fixture(scope="module")
def job(shared, tmp_path_factory):
    """job(home) -> the configuration of huanhuan's run in `home`, of a tiny model with Qwen2.5's tokenizer."""
    files = tmp_path_factory.mktemp("huanhuan")
    rows = json.loads((shared / "data" / "huanhuan.json").read_text(encoding="utf-8"))
    parts = {"a": rows[:2000], "b": rows[2000:3000], "c": rows[3000:]}
    for name, part in parts.items():
        (files / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    shutil.copytree(shared / "assets" / "qwen2.5-tokenizer", files / "model")
    (files / "model" / "config.json").write_text(json.dumps(MODEL | {"vocab_size": 151936, "hidden_size": 16}))
    weights = {"a": 1.0, "b": 2.0, "c": 3.0}

    def job(home: Path) -> Path:
        home.mkdir()
        sources = [{"path": str(files / f"{name}.json"), "name": name, "weight": weights[name]} for name in parts]
        tree = {
            "model": {"path": str(files / "model"), "init": "random"},
            "tune": {"method": "lora", "rank": 2},
            "data": {"sources": sources, "max_length": 128},
            "train": {"output_dir": str(home / "run"), "steps": STEPS, "batch_size": 8},
            "mesh": {"data": -1, "fsdp": 1},
            "checkpoint": {"every": EVERY},
            "log": {"every": 1, "tensorboard": False},
        }
        return write_config(home / "config.yaml", tree)

    return job


@pytest.fixture(scope="module")
def expected(job, tmp_path_factory) -> list:
    """(step, hash of its batch, examples of each source) of a run on one device that nobody killed."""
    config = job(tmp_path_factory.mktemp("whole") / "home")
    one_process(config, 1).finish()
    found = stream(config)
    assert [step for step, *_ in found] == list(range(1, STEPS + 1))
    assert all(set(counts) == set("abc") for *_, counts in found)
    return found


def stream(config: Path) -> list:
    rows = read_jsonl(config.parent / "run" / "ledger.jsonl")
    return [(row["step"], row["batch_sha256"], row["source_examples"]) for row in rows]


def one_process(config: Path, devices: int) -> Trainer:
    return Trainer(config, environment={"XLA_FLAGS": child_environment(devices)["XLA_FLAGS"]})


def steps_of(config: Path) -> int:
    ledger = config.parent / "run" / "ledger.jsonl"
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.thorough), 8])
def test_killed_in_one_process_it_goes_on_with_the_same_batches(job, expected, tmp_path, devices):
    config = job(tmp_path / "home")
    for steps in (1, EVERY + 2):
        trainer = one_process(config, devices)
        trainer.wait_for(lambda steps=steps: steps_of(config) >= steps)
        assert trainer.send(signal.SIGKILL) == -signal.SIGKILL
    one_process(config, devices).finish()
    assert stream(config) == expected


def test_killed_in_two_processes_of_four_devices_it_goes_on_with_the_same_batches(job, expected, tmp_path):
    config = job(tmp_path / "home")
    killed = support.start(config, devices=4)
    support.wait_for_steps(killed, config.parent / "run", EVERY + 1)
    for pid in support.children(killed):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert support.finish(killed)[0] != 0
    code, output = support.finish(support.start(config, devices=4))
    assert code == 0, output
    assert stream(config) == expected
