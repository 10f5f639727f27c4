"""A step finds its batch made: a thread is ahead of the loop, which tells how long it waited all the same."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from jaxtune import loop
from jaxtune.config import make_config
from jaxtune.data.dataset import Dataset
from jaxtune.data.examples import join
from jaxtune.errors import DataError
from tests.runs import sections, write_config
from tools import data_bench

STEPS, AHEAD = 40, 4


def dataset() -> Dataset:
    rows = [(np.arange(8, dtype=np.int32), np.arange(8) > 3) for _ in range(STEPS)]
    return Dataset(join(rows), time=8, batch_size=1)


@pytest.fixture
def made(monkeypatch):
    """The steps whose batches are made so far; `made.until(step)` waits for one."""
    real, changed = Dataset.batch, threading.Condition()

    class Made(list):
        def until(self, step):
            with changed:
                assert changed.wait_for(lambda: step in self, 30), f"step {step} is not among {self}"

    made = Made()

    def batch(self, step, rows=None):
        found = real(self, step, rows)
        with changed:
            made.append(step)
            changed.notify_all()
        return found

    monkeypatch.setattr(Dataset, "batch", batch)
    return made


def test_the_next_batches_are_made_while_a_step_computes_and_not_the_whole_run(made):
    batches = dataset().batches()
    next(batches)
    made.until(1 + AHEAD)  # though nobody has asked for them
    time.sleep(0.05)
    assert max(made) <= 1 + AHEAD + 2  # one more in the thread's hands, one that waits for a place


def test_a_run_that_goes_on_makes_no_batch_of_the_steps_before(made):
    batches = list(dataset().batches(first_step=STEPS - 3))
    assert sorted(made) == [STEPS - 3, STEPS - 2, STEPS - 1, STEPS] and len(batches) == 4


def test_what_goes_wrong_in_the_thread_is_raised_at_its_step(monkeypatch):
    real = Dataset.batch

    def torn(self, step, rows=None):
        if step == 3:
            raise DataError("rows.jsonl:17: torn")
        return real(self, step, rows)

    monkeypatch.setattr(Dataset, "batch", torn)
    batches = dataset().batches()
    next(batches), next(batches)
    with pytest.raises(DataError, match=r"rows\.jsonl:17: torn"):
        next(batches)


def test_the_seconds_that_a_step_waits_stand_in_the_runs_metrics(tiny_model, tmp_path, monkeypatch):
    clock, real = SimpleNamespace(now=0.0), Dataset.batches

    def slow(self, *given):
        for number, batch in enumerate(real(self, *given), 1):
            clock.now += number
            yield batch

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now, monotonic=time.monotonic))
    monkeypatch.setattr(Dataset, "batches", slow)
    rows = loop.train(make_config(sections(tiny_model("qwen2"), tmp_path, steps=4, log={"every": 2})))
    assert [row["data_wait_seconds"] for row in rows] == [1.5, 3.5]


def test_the_benchmark_runs_the_loop_and_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    config = write_config(tmp_path / "c.yaml", sections(tiny_model("qwen2"), tmp_path))
    monkeypatch.setattr("sys.argv", ["data_bench.py", "--train", str(config), "--steps", "3", "optim.lr=0.02"])
    found = data_bench.train(data_bench.parse())
    assert found["steps"] == 2 and 0 <= found["percent_of_the_time"] <= 100
    assert found["examples_per_second_of_the_loader"] > 0
    assert not (tmp_path / "run").exists()
