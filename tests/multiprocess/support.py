"""Runs in several processes: by `jaxtune launch`, or each process by hand where they are to differ."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from jaxtune.launch import child_environment as place
from jaxtune.launch import free_port
from tests.conftest import child_environment
from tests.peer import read_jsonl
from tests.runs import sections, write_config

HEARTBEAT = 10
TIMEOUT = 240  # seconds: two cores, shared
STEPS = 9
ENVIRONMENT = {"JAXTUNE_HEARTBEAT_SECONDS": str(HEARTBEAT)}


def configuration(model: Path, home: Path, **more) -> Path:
    """LoRA with dropout, packing, a schedule, evaluations: whatever could go out of step."""
    settings = {
        "tune": {"method": "lora", "rank": 4, "dropout": 0.1, "targets": ["q_proj", "v_proj"]},
        "optim": {"schedule": "cosine", "warmup": 0.1},
        "checkpoint": {"every": 3},
        "eval": {"fraction": 0.1, "every": 5},
        "mesh": {"data": 2, "fsdp": -1},
    }
    return write_config(home / "config.yaml", sections(model, home, steps=STEPS, **settings | more))


def start(config: Path, *overrides: str, devices: int = 2) -> subprocess.Popen:
    """`jaxtune launch` of two processes with so many devices each."""
    launch = ["-m", "jaxtune", "launch", "--processes", "2", "--devices-per-process", str(devices)]
    return _open([*launch, "--", "train", "--config", str(config), *overrides], child_environment(env=ENVIRONMENT))


def single(config: Path, *overrides: str, devices: int) -> tuple[int, str]:
    """The run in one process: (exit code, output)."""
    return finish(_open(["-m", "jaxtune.train", "--config", str(config), *overrides], child_environment(devices)))


def by_hand(*scripts: list[str], devices: int = 1) -> list[subprocess.Popen]:
    """A process for each list of Python's arguments."""
    address, count = f"127.0.0.1:{free_port()}", len(scripts)
    environment = child_environment(env=ENVIRONMENT)
    return [_open(script, place(environment, address, n, count, devices)) for n, script in enumerate(scripts)]


def _open(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, output); a process that hangs is killed, and so are those that it started."""
    below = children(process)
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        for pid in [*below, *children(process), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise


def children(process: subprocess.Popen) -> list[int]:
    """The pids of the processes that a launcher has started, in order."""
    try:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def wait_for_steps(process: subprocess.Popen, run: Path, steps: int) -> None:
    """Until the ledger has so many steps."""
    ledger, end = run / "ledger.jsonl", time.monotonic() + TIMEOUT
    while not ledger.exists() or ledger.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def result(run: Path) -> tuple[list[dict], bytes, list[float]]:
    """What must be equal: the ledger, the adapter's bytes, the evaluations."""
    evaluations = [row["eval_loss"] for row in read_jsonl(run / "metrics.jsonl") if "eval_loss" in row]
    return read_jsonl(run / "ledger.jsonl"), (run / "adapter/adapter_model.safetensors").read_bytes(), evaluations


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
