"""Small runs for the tests of what comes after training: a tiny model, twenty conversations, a few steps."""

import json
from pathlib import Path

ROWS = [{"instruction": f"What is {i}?", "output": f"It is number {i}."} for i in range(20)]
LORA = {"method": "lora", "rank": 4, "targets": "all-linear"}


def sections(model: Path, home: Path, /, *, steps: int = 4, tune: dict | None = None, **more) -> dict:
    """The configuration of a run in `home`/run on data that is written to `home`. more: keys of other sections."""
    home.mkdir(parents=True, exist_ok=True)
    data = home / "data.json"
    data.write_text(json.dumps(ROWS), encoding="utf-8")
    tree = {
        "model": {"path": str(model)},
        "tune": dict(LORA if tune is None else tune),
        "data": {"path": str(data), "max_length": 64},
        "train": {"output_dir": str(home / "run"), "steps": steps, "batch_size": 8},
        "optim": {"lr": 0.01, "schedule": "constant", "warmup": 0},
        "checkpoint": {"every": 2},
        "log": {"every": 1, "tensorboard": False},
    }
    for name, section in more.items():
        tree[name] = {**tree.get(name, {}), **section}
    return tree


def write_config(path: Path, tree: dict) -> Path:
    """The configuration as a file; JSON is YAML."""
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def unfinish(run: Path) -> None:
    """Leave the run as it was before its result was written."""
    import shutil

    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps({**record, "finished": False}), encoding="utf-8")
    for name in ("adapter", "model"):
        shutil.rmtree(run / name, ignore_errors=True)


def stopped_after(step: int, settings) -> None:
    """A run, in this process, that is asked to stop when it records this step. It ends with SystemExit."""
    import os
    import signal
    from unittest import mock

    from jaxtune.loop import train
    from jaxtune.metrics import Recorder

    record = Recorder.step

    def stop(self, number, **numbers):
        record(self, number, **numbers)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(Recorder, "step", stop):
        train(settings)
