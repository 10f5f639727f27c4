"""The record of a run: what its lines say, what a kill leaves, what a full disk does."""

import json
import math
import os
import shutil

import pytest

from jaxtune import metrics, record_files
from jaxtune.config import LogSection
from jaxtune.errors import CheckpointError, SaveError
from jaxtune.metrics import Recorder, duration, read_rows
from tests.peer import read_jsonl

HAS_FULL_DEVICE = os.path.exists("/dev/full")
needs_full_device = pytest.mark.skipif(not HAS_FULL_DEVICE, reason="/dev/full is Linux's")


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move by hand: clock.now += 1.0."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(metrics.time, "monotonic", lambda: Clock.now)
    return Clock


def recorder(run_dir, total_steps=6, every=2, done=0, tensorboard=False):
    return Recorder(run_dir, LogSection(every=every, tensorboard=tensorboard), total_steps, done)


def record(run, step, **changes):
    values = {"loss": 3.0 / step, "grad_norm": 0.5, "lr": 0.01 * step, "tokens": 10 * step, "supervised_tokens": step}
    run.step(step, batch_sha256=f"{step:064x}", **(values | changes))


def lines(run_dir, name="metrics.jsonl"):
    return read_jsonl(run_dir / name)


def test_a_line_is_written_every_so_many_steps_and_at_the_last(tmp_path):
    with recorder(tmp_path, total_steps=5, every=2) as run:
        for step in range(1, 6):
            record(run, step)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 5]


def test_a_line_holds_the_steps_own_loss_and_the_tokens_since_the_last_line(tmp_path, clock):
    with recorder(tmp_path, total_steps=4, every=2) as run:
        for step in range(1, 5):
            clock.now += 2.0
            record(run, step)
    first, second = lines(tmp_path)
    assert first.items() >= {"step": 2, "loss": 1.5, "lr": 0.02, "grad_norm": 0.5}.items()
    assert (first["tokens"], first["supervised_tokens"], first["tokens_per_second"]) == (30, 3, 7.5)
    assert (second["tokens"], second["supervised_tokens"], second["tokens_per_second"]) == (70, 7, 17.5)
    assert (first["total_tokens"], second["total_tokens"]) == (30, 100)


def test_a_line_holds_the_mean_wait_for_data_of_its_own_steps(tmp_path):
    with recorder(tmp_path, total_steps=4, every=3) as run:
        for step, seconds in enumerate((3.0, 0.0, 1.5, 0.25), 1):
            record(run, step, data_wait=seconds)
    assert [line["data_wait_seconds"] for line in lines(tmp_path)] == [1.5, 0.25]
    assert "wait" not in (tmp_path / "ledger.jsonl").read_text()  # two runs are equal however long they waited


def test_time_before_the_start_is_not_counted(tmp_path, clock):
    run = recorder(tmp_path)
    clock.now += 60.0
    run.start()
    for step in (1, 2):
        clock.now += 1.0
        record(run, step)
    run.close()
    assert lines(tmp_path)[0]["tokens_per_second"] == 15.0


def test_the_seconds_of_an_evaluation_are_not_training(tmp_path, clock):
    with recorder(tmp_path, every=2) as run:
        for step in range(1, 5):
            clock.now += 1.0
            record(run, step)
            if step % 2 == 0:
                clock.now += 30.0
                run.evaluation(step, 1.0)
    assert [line["tokens_per_second"] for line in lines(tmp_path)] == [15.0, 35.0]


def test_an_evaluation_adds_its_loss_to_the_line_of_its_step(tmp_path):
    with recorder(tmp_path, every=2) as run:
        record(run, 1)
        record(run, 2)
        run.evaluation(2, 1.25)
        record(run, 3)
        record(run, 4)
    assert [line.get("eval_loss") for line in lines(tmp_path)] == [1.25, None]
    assert run.rows == lines(tmp_path)


def test_an_evaluation_between_two_lines_makes_a_line_of_its_own(tmp_path):
    with recorder(tmp_path, every=4) as run:
        for step in range(1, 5):
            record(run, step)
            if step == 3:
                run.evaluation(step, 2.5)
    third, fourth = lines(tmp_path)
    assert (third["step"], third["eval_loss"], third["tokens"]) == (3, 2.5, 60)
    assert (fourth["step"], fourth["tokens"]) == (4, 40)


def test_the_ledger_has_every_step_with_exact_numbers(tmp_path):
    with recorder(tmp_path) as run:
        for step in (1, 2, 3):
            record(run, step, loss=0.1 * step)
    ledger = lines(tmp_path, "ledger.jsonl")
    assert [line["step"] for line in ledger] == [1, 2, 3]
    assert [float.fromhex(line["loss"]) for line in ledger] == [0.1 * step for step in (1, 2, 3)]
    assert ledger[0]["batch_sha256"] == f"{1:064x}"
    assert ledger[0]["grad_norm"] == (0.5).hex()


def test_jax_and_numpy_scalars_are_as_good_as_floats(tmp_path):
    import jax.numpy as jnp
    import numpy as np

    with recorder(tmp_path, every=1) as run:
        record(run, 1, loss=jnp.float32(0.1), grad_norm=np.float32(0.2), lr=jnp.float32(0.3), tokens=np.int64(7))
    assert lines(tmp_path)[0]["tokens"] == 7
    assert float.fromhex(lines(tmp_path, "ledger.jsonl")[0]["loss"]) == float(np.float32(0.1))


def test_a_loss_that_is_not_finite_is_null_in_the_metrics_and_named_in_the_ledger(tmp_path, capsys):
    with recorder(tmp_path, every=1) as run:
        record(run, 1, loss=math.nan, grad_norm=math.inf, bad_steps=1)
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (line["loss"], line["grad_norm"], line["bad_steps"]) == (None, None, 1)
    assert lines(tmp_path, "ledger.jsonl")[0].items() >= {"loss": "nan", "grad_norm": "inf"}.items()
    assert "  1 skipped" in capsys.readouterr().out


def test_without_a_terminal_each_line_is_one_plain_line(tmp_path, capsys, clock):
    with recorder(tmp_path, total_steps=6, every=2) as run:
        for step in (1, 2):
            clock.now += 45.0
            record(run, step, tokens=45_000)
        run.evaluation(2, 1.0)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 2/6  loss 1.5000  lr 2.0e-02  1,000 tokens/s  ")
    assert first.endswith(" GiB  3:00 left")
    assert second == "step 2/6  loss 1.5000  eval loss 1.0000"


def test_on_a_terminal_there_is_a_bar_and_an_evaluation_stands_above_it(tmp_path, monkeypatch):
    import io

    from jaxtune.console import console

    screen = io.StringIO()
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_file", screen)
    with recorder(tmp_path, total_steps=2, every=1) as run:
        record(run, 1)
        run.evaluation(1, 1.0)
        record(run, 2)
    shown = screen.getvalue()
    assert "2/2  loss 1.5000" in shown
    assert "step 1/2  loss 3.0000  eval loss 1.0000" in shown
    assert "step 2/2  loss" not in shown


# Going on from a checkpoint


def run_until(run_dir, last, **options):
    with recorder(run_dir, **options) as run:
        for step in range(options.get("done", 0) + 1, last + 1):
            record(run, step)


def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run_until(tmp_path / "whole", 6)
    run_until(tmp_path / "killed", 5)
    run_until(tmp_path / "killed", 6, done=3)
    whole, killed = ((tmp_path / name / "ledger.jsonl").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    for mine, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "killed"), strict=True):
        for key in ("step", "loss", "tokens", "supervised_tokens", "total_tokens"):
            assert mine[key] == other[key], key


def test_a_run_killed_before_its_first_checkpoint_starts_with_empty_files(tmp_path):
    run_until(tmp_path, 3)
    run_until(tmp_path, 1)
    assert [line["step"] for line in lines(tmp_path, "ledger.jsonl")] == [1]
    assert lines(tmp_path) == []


@pytest.mark.parametrize("torn", [b'{"step": 4, "loss', b'{"step": 4}', b"\x00\x00\x00", b"\n", b"7\n"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    run_until(tmp_path, 3)
    for name in ("metrics.jsonl", "ledger.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(torn)
    run_until(tmp_path, 6, done=3)
    assert [line["step"] for line in lines(tmp_path, "ledger.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]


def test_the_rows_of_a_run_are_read_as_far_as_they_are_whole(tmp_path):
    assert read_rows(tmp_path) == []
    run_until(tmp_path, 6)
    whole = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 7')
    assert read_rows(tmp_path) == whole
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b'{"step": 7')


def test_missing_ledger_lines_are_told(tmp_path, capsys):
    run_until(tmp_path, 2)
    recorder(tmp_path, done=3).close()
    assert "holds 2 of the 3 steps" in capsys.readouterr().out


def test_files_that_need_no_rewinding_are_not_rewritten(tmp_path):
    run_until(tmp_path, 3)
    before = (tmp_path / "ledger.jsonl").stat().st_ino
    recorder(tmp_path, done=3).close()
    assert (tmp_path / "ledger.jsonl").stat().st_ino == before


def test_an_evaluation_right_after_a_resume_amends_the_line_that_was_there(tmp_path):
    run_until(tmp_path, 6)
    with recorder(tmp_path, done=6) as run:
        run.evaluation(6, 0.5)
    assert [line.get("eval_loss") for line in lines(tmp_path)] == [None, None, 0.5]


def test_a_metrics_file_that_lost_its_line_at_a_kill_is_whole_again_at_the_next(tmp_path):
    run_until(tmp_path, 3)
    (tmp_path / "metrics.jsonl").write_text("")
    run_until(tmp_path, 4, done=3)
    assert [(line["step"], line["tokens"]) for line in lines(tmp_path)] == [(4, 100)]


# A full disk


@needs_full_device
def test_metrics_that_cannot_be_written_warn_once_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    run_until(tmp_path, 6)
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written: No space left on device") == 1
    assert len(lines(tmp_path, "ledger.jsonl")) == 6


@needs_full_device
def test_a_ledger_that_cannot_be_written_stops_the_run(tmp_path):
    (tmp_path / "ledger.jsonl").symlink_to("/dev/full")
    with recorder(tmp_path) as run, pytest.raises(SaveError, match=r"ledger.jsonl: step 1 .* No space left"):
        record(run, 1)


def test_a_metrics_file_that_cannot_be_opened_warns_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    run_until(tmp_path, 2)
    assert "metrics.jsonl cannot be written" in capsys.readouterr().out


def test_tensorboard_that_cannot_be_written_warns_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    run_until(tmp_path, 6, tensorboard=True)
    assert capsys.readouterr().out.count("tensorboard cannot be written") == 1
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]


def test_a_line_cut_short_by_a_full_disk_is_written_over(tmp_path, run_python):
    code = """
import resource, signal, sys
from pathlib import Path
from jaxtune.record_files import LineFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = LineFile(Path(sys.argv[1]))
file.append({"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
try:
    file.append({"step": 2, "pad": "x" * 50})
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.append({"step": 3})
"""
    done = run_python(code, str(tmp_path / "lines.jsonl"))
    assert "8 of 73 bytes fitted" in done.stdout, done.stderr
    assert [line["step"] for line in lines(tmp_path, "lines.jsonl")] == [1, 3]


def test_an_evaluation_cut_short_by_a_full_disk_leaves_its_line_whole(tmp_path, run_python):
    code = """
import resource, signal, sys
from pathlib import Path
from jaxtune.record_files import LineFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = LineFile(Path(sys.argv[1]))
file.append({"step": 1})
for room in 12, 20:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        file.amend({"eval_loss": 1.25})
    except OSError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.append({"step": 2})
file.amend({"eval_loss": 1.5})
"""
    done = run_python(code, str(tmp_path / "lines.jsonl"))
    assert "2 of 21 bytes fitted" in done.stdout and "10 of 21 bytes fitted" in done.stdout, done.stdout + done.stderr
    assert lines(tmp_path, "lines.jsonl") == [{"step": 1}, {"step": 2, "eval_loss": 1.5}]


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl"])
def test_a_record_that_may_not_be_read_is_told(tmp_path, forbid, name):
    run_until(tmp_path, 2)
    forbid(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read: Permission denied"):
        recorder(tmp_path, done=1)


# TensorBoard


def events(directory):
    """(step, tag, value) of each scalar, and ("start", step) of each session, read with tensorboardX's own types in the
    order of names, as TensorBoard does."""
    import struct

    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                found.append(("start", event.step))
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_gets_the_lines_and_the_evaluations(tmp_path):
    with recorder(tmp_path, every=2, tensorboard=True) as run:
        record(run, 1)
        record(run, 2)
        run.evaluation(2, 1.25)
    found = events(tmp_path / "tensorboard")
    assert (2, "train/loss", 1.5) in found
    assert (2, "eval/loss", 1.25) in found
    assert {entry[1] for entry in found[1:]} == {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/tokens_per_second",
        "train/data_wait_seconds",
        "eval/loss",
    }


def test_tensorboard_gets_the_examples_of_each_source(tmp_path):
    with recorder(tmp_path, every=1, tensorboard=True) as run:
        record(run, 1, source_examples={"a b": 3, "c": 0})
        record(run, 2, source_examples={"a b": 2, "c": 4})
    found = [event for event in events(tmp_path / "tensorboard") if "sources/" in str(event[1])]
    assert found == [(1, "sources/a_b", 3), (1, "sources/c", 0), (2, "sources/a_b", 5), (2, "sources/c", 4)]


def test_tensorboard_is_told_where_a_resumed_run_starts(tmp_path):
    run_until(tmp_path, 4, tensorboard=True)
    os.rename(tmp_path / "tensorboard", tmp_path / "first")
    run_until(tmp_path, 6, done=3, tensorboard=True)
    assert events(tmp_path / "first")[0] == ("start", 1)
    assert events(tmp_path / "tensorboard")[0] == ("start", 4)


def test_tensorboard_reads_a_resumed_run_last_also_where_the_clock_was_set_back(tmp_path, monkeypatch):
    for seconds, done in ((2e9, 0), (1e9, 3), (2e9, 4)):
        monkeypatch.setattr(record_files.time, "time", lambda now=seconds: now)
        run_until(tmp_path, done + 2, done=done, tensorboard=True)
    found = [event for event in events(tmp_path / "tensorboard") if event[0] == "start"]
    assert found == [("start", 1), ("start", 4), ("start", 5)]


def test_tensorboard_can_be_turned_off(tmp_path):
    run_until(tmp_path, 2)
    assert not (tmp_path / "tensorboard").exists()


def test_closing_twice_does_no_harm(tmp_path):
    run = recorder(tmp_path, tensorboard=True)
    run.start()
    run.close()
    run.close()
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (187, "3:07"), (7500, "2:05:00"), (360000, "100:00:00")],
)
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


def test_memory_is_that_of_this_process_on_a_cpu():
    assert 50 * 2**20 < metrics.memory_in_use() < 64 * 2**30
