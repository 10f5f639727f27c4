"""A run directory is new, this run's or refused; and nothing in it is written over by mistake."""

import json
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from jaxtune.config import load_config, make_config
from jaxtune.drift import fingerprint
from jaxtune.errors import CheckpointError, SaveError, UserError
from jaxtune.files import try_lock
from jaxtune.rundir import open_run
from tests.rundir.support import take_steps, tree

HOLD = """
import sys, time
from jaxtune.config import load_config
from jaxtune.rundir import open_run
with open_run(load_config(sys.argv[1])) as run:
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_new_run_has_its_resolved_configuration_written_down(tmp_path, settings):
    config = settings()
    with open_run(config) as run:
        assert (run.directory, run.checkpoints) == (tmp_path / "run", tmp_path / "run" / "checkpoints")
        assert not run.begun and not run.finished
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert not list((tmp_path / "run").glob("*.partial"))


def test_the_same_command_goes_on(tmp_path, settings, model, capsys):
    take_steps(settings(), model)
    with open_run(settings()) as run:
        assert run.begun and not run.finished
        run.check("data", model, total_steps=100)
    assert f"{tmp_path / 'run'}: going on with the run in it" in capsys.readouterr().out


def test_a_finished_run_says_so_and_does_nothing(tmp_path, settings, model, capsys):
    take_steps(settings(), model, finish=True)
    before = tree(tmp_path / "run")
    with open_run(settings()) as run:
        assert run.finished
    assert tree(tmp_path / "run") == before
    assert "this run is finished; raise train.steps or train.epochs to train for longer" in capsys.readouterr().out
    with open_run(settings(optim={"lr": 0.01})) as run:
        assert run.finished
    out = capsys.readouterr().out
    assert "this run is finished" in out and "optim.lr" not in out  # nothing will be trained with it


def test_a_finished_run_that_is_to_be_longer_goes_on(settings, model):
    take_steps(settings(), model, finish=True)
    with open_run(settings(train={"epochs": 5})) as run:
        assert run.begun and not run.finished
        run.check("data", model, total_steps=200)
        run.begin(100)
    with open_run(settings(train={"epochs": 5})) as run:
        assert not run.finished  # it was cut off: the result there is of the shorter run


def test_a_finished_run_whose_result_is_gone_makes_it_again(tmp_path, settings, model):
    take_steps(settings(), model, finish=True)
    (tmp_path / "run" / "adapter").rename(tmp_path / "taken")
    with open_run(settings()) as run:
        assert run.begun and not run.finished


def test_another_configuration_is_refused_with_every_difference_and_nothing_is_written(tmp_path, settings, model):
    take_steps(settings(), model)
    before = tree(tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        open_run(settings(train={"seed": 1, "batch_size": 16}, tune={"rank": 4}, optim={"lr": 1.0}))
    message = str(caught.value)
    for line in ("train.seed: was 0, now 1", "train.batch_size: was 8, now 16", "tune.rank: was 8, now 4"):
        assert f"\n  {line}\n" in message
    assert "optim.lr" not in message and "choose another train.output_dir" in message
    assert tree(tmp_path / "run") == before


def test_a_new_learning_rate_is_printed_and_written_down(tmp_path, settings, model, capsys):
    take_steps(settings(), model)
    config = settings(optim={"lr": 0.01}, log={"every": 1})
    with open_run(config) as run:
        out = capsys.readouterr().out
        assert "Warning: optim.lr: was 0.0001, now 0.01" in out
        assert "log.every: was 10, now 1" in out and "Warning: log" not in out
        run.check("data", model)
        run.begin(100)
        assert run.meta["changes"] == [["optim.lr: was 0.0001, now 0.01", "log.every: was 10, now 1"]]
    assert load_config(tmp_path / "run" / "config.yaml") == config
    with open_run(config):
        assert "lr" not in capsys.readouterr().out  # compared with the last start


def test_a_change_is_not_written_before_the_data_and_the_model_were_checked(tmp_path, settings, model):
    take_steps(settings(), model)
    before = tree(tmp_path / "run")
    with open_run(settings(optim={"lr": 0.01})) as run, pytest.raises(CheckpointError):
        run.check("other data", model)
    assert tree(tmp_path / "run") == before


def test_a_longer_run_is_not_written_down_before_all_is_in_place(tmp_path, settings, model):
    take_steps(settings(), model, finish=True)
    before = tree(tmp_path / "run")
    with open_run(settings(train={"epochs": 5})) as run:
        run.check("data", model, total_steps=200)  # and then something of it cannot be
    assert tree(tmp_path / "run") == before
    with open_run(settings()) as run:
        assert run.finished


def test_a_run_with_a_result_and_no_checkpoint_is_not_trained_again(tmp_path, settings, model):
    take_steps(settings(), model, finish=True)
    (tmp_path / "run" / "checkpoints" / "100").rmdir()
    before = tree(tmp_path / "run")
    with open_run(settings(train={"epochs": 5})) as run:
        with pytest.raises(CheckpointError, match=r"ended \(adapter/ is its result\).* no checkpoint to go on from"):
            run.check("data", model, total_steps=200)
    assert tree(tmp_path / "run") == before


def test_a_run_that_was_cut_off_before_its_first_checkpoint_says_that_it_begins_again(settings, model, capsys):
    take_steps(settings(), model)
    with open_run(settings()) as run:
        run.check("data", model)
        run.begin(0)
    assert "no checkpoint was saved yet; it begins at step 1 again" in capsys.readouterr().out


def test_other_held_out_data_is_warned_about_unless_it_was_asked_for(settings, model, capsys):
    def start(held_out, **changes):
        with open_run(settings(**changes)) as run:
            run.check("data", model, held_out=held_out)
            run.begin(0 if held_out == "a" else 100)
        return "the held-out data changed" in capsys.readouterr().out

    assert not start("a")
    take_steps(settings(), model)
    assert not start("a")
    assert start("b")
    assert not start("b")
    assert not start("c", eval={"path": "other.json"})


def test_editing_the_runs_own_config_file_does_not_hide_a_change(tmp_path, settings, model):
    take_steps(settings(), model)
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(CheckpointError, match=r"train\.seed: was 0, now 1"):
        open_run(load_config(path))


def test_changed_data_is_refused_by_name(tmp_path, settings, model):
    take_steps(settings(), model)
    with open_run(settings()) as run:
        with pytest.raises(CheckpointError, match=r"the training data \(d\.json\) changed since this run began"):
            run.check("other", model)


def test_data_in_another_place_is_compared_by_what_it_holds(tmp_path, settings, model, capsys):
    take_steps(settings(), model)
    config = settings(data={"path": "moved/d.json"})
    with open_run(config) as run:
        with pytest.raises(CheckpointError, match=r"the training data \(moved/d\.json\) changed since this run began"):
            run.check("other", model)
        assert load_config(tmp_path / "run" / "config.yaml") == settings()
        run.check("data", model)
        run.begin(5)
    assert "data.path: was d.json, now moved/d.json\n" in capsys.readouterr().out
    assert load_config(tmp_path / "run" / "config.yaml") == config


def test_data_in_another_place_is_refused_where_it_is_not_read(settings, model):
    take_steps(settings(), model, finish=True)
    with pytest.raises(CheckpointError, match=r"data\.path: was d\.json, now other\.json"):
        open_run(settings(data={"path": "other.json"}))


def test_a_changed_base_model_or_adapter_is_refused_by_name(tmp_path, settings, model):
    adapter = tmp_path / "start"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"a")
    config = settings(tune={"adapter": str(adapter)})
    take_steps(config, model)
    (model / "model.safetensors").write_bytes(b"weightz")
    with open_run(config) as run, pytest.raises(CheckpointError, match=r"the base model \(.*model\) changed"):
        run.check("data", model)
    (model / "model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_model.safetensors").write_bytes(b"b")
    with (
        open_run(config) as run,
        pytest.raises(CheckpointError, match=r"the adapter to start from \(.*start\) changed"),
    ):
        run.check("data", model)


@pytest.mark.parametrize("finish", [False, True])
def test_a_base_model_that_was_moved_is_the_same_and_another_in_another_place_is_not(
    tmp_path, settings, model, capsys, finish
):
    take_steps(settings(), model, finish=finish)
    moved, other = model.rename(tmp_path / "moved"), tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"weightz")
    before = tree(tmp_path / "run")
    for place in (other, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=f"model.path: was {model}, now {place}\n"):
            open_run(settings(model={"path": str(place)}))
    assert tree(tmp_path / "run") == before
    config = settings(model={"path": str(moved)})
    with open_run(config) as run:
        assert run.finished == finish
        if not finish:
            run.check("data", moved)
            run.begin(100)
    assert f"model.path: was {model}, now {moved}: the same model\n" in capsys.readouterr().out
    assert load_config(tmp_path / "run" / "config.yaml") == config  # so that whoever loads the run finds it


def test_a_run_of_the_version_before_goes_on_with_its_model(tmp_path, settings, model):
    take_steps(settings(), model)
    (model / "tokenizer_config.json").write_text("{}")
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    endings = (".safetensors", ".safetensors.index.json", "config.json")
    record["fingerprints"]["model"] = fingerprint(model, settings=(), endings=endings)
    del record["template"]
    path.write_text(json.dumps(record))
    with open_run(settings()) as run:
        run.check("data", model)
        run.begin(100)
    assert json.loads(path.read_text())["fingerprints"]["model"] == fingerprint(model)


def test_a_run_that_was_to_evaluate_on_nothing_goes_on(tmp_path, settings, model):
    """`eval.every` without held-out data is refused now; what is written down of such a run has all keys."""
    take_steps(settings(eval={"every": 5, "fraction": 0.0}), model)
    assert load_config(tmp_path / "run" / "config.yaml").eval.every == 5
    with open_run(settings()) as run:
        assert run.begun and run.before("eval.every", 0) == 5


def test_a_run_that_has_taken_no_step_may_begin_again_as_anything(tmp_path, settings, model):
    with open_run(settings()) as run:
        run.check("data", model)
        run.begin(0)
    config = settings(train={"seed": 5}, data={"path": "right.json"})
    with open_run(config) as run:
        assert not run.begun
        run.check("right data", model)
        run.begin(0)
    assert load_config(tmp_path / "run" / "config.yaml") == config


def test_a_run_is_not_made_shorter_than_it_is(settings, model):
    take_steps(settings(), model, step=100)
    with open_run(settings(train={"steps": 50})) as run:
        with pytest.raises(CheckpointError, match=r"50 steps are asked for, and 100 are done; raise train\.steps"):
            run.check("data", model, total_steps=50)


def test_resume_never_refuses_a_directory_that_has_a_run(settings, model):
    never = settings(checkpoint={"resume": "never"})
    open_run(never).__exit__()
    open_run(never).__exit__()  # nothing was trained: nothing to refuse
    take_steps(settings(), model)
    with pytest.raises(CheckpointError, match=r"there is a run in it, and checkpoint\.resume is never"):
        open_run(never)


@pytest.mark.parametrize("name", ["thesis.txt", "config.yaml", "model", "checkpoints"])
def test_a_directory_with_other_things_in_it_is_refused_and_left_as_it_is(tmp_path, settings, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"there are other things in it \\({name}\\) and no run.json"):
        open_run(settings())
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_hidden_files_and_what_a_cut_off_start_left_are_no_hindrance(tmp_path, settings):
    (tmp_path / "run").mkdir()
    for name in (".gitkeep", "run.lock", "run.json.partial"):
        (tmp_path / "run" / name).write_text("")
    open_run(settings()).__exit__()


def test_what_a_user_puts_beside_a_run_stays(tmp_path, settings, model):
    take_steps(settings(), model)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    open_run(settings()).__exit__()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("way", ["run", "run/below"])
def test_a_file_in_the_way_is_named(tmp_path, settings, way):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match=r"train\.output_dir .*run.*: cannot be used: .*run.*choose a directory"):
        open_run(settings(train={"output_dir": str(tmp_path / way)}))
    assert (tmp_path / "run").read_text() == "a file"


@pytest.mark.parametrize(
    ("begun", "name", "mode"),
    [(False, "", 0o555), (True, "", 0o555), (True, "checkpoints", 0), (True, "ledger.jsonl", 0o444)],
)
def test_a_directory_that_may_not_be_written_to_is_told_before_anything_else(settings, model, begun, name, mode):
    with tempfile.TemporaryDirectory() as home:  # pytest's own are closed to other users
        config = settings(train={"output_dir": home})
        if begun:
            take_steps(config, model)
        for path in (Path(home), *Path(home).iterdir()):
            path.chmod(0o777)
        (Path(home) / name).chmod(mode)
        code = (
            "import os; from jaxtune.config import make_config; from jaxtune.rundir import open_run\n"
            "if os.geteuid() == 0: os.setuid(65534)\n"
            f"try: open_run(make_config({config.model_dump()!r}))\n"
            "except Exception as error: print(type(error).__name__, error)"
        )
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        (Path(home) / name).chmod(stat.S_IRWXU)
        assert child.stdout.startswith(f"CheckpointError train.output_dir {home}: cannot be used: "), child.stderr
        assert "Permission denied" in child.stdout


def hold(config, tmp_path):
    path = tmp_path / "held.json"  # JSON is YAML
    path.write_text(json.dumps(config.model_dump()))
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    while line := child.stdout.readline():
        if line == "held\n":
            return child
    raise AssertionError("the child did not take the directory")


def test_a_file_where_the_result_will_be_is_told_before_anything_is_trained(tmp_path, settings, model):
    take_steps(settings(), model)
    (tmp_path / "run" / "adapter").write_text("mine")
    with pytest.raises(CheckpointError, match="adapter: is in the way of the run's result"):
        open_run(settings())
    assert (tmp_path / "run" / "adapter").read_text() == "mine"


def test_a_directory_of_a_live_run_is_refused_and_free_when_the_process_is_dead(tmp_path, settings):
    child = hold(settings(), tmp_path)
    try:
        with pytest.raises(CheckpointError, match=f"another process trains in it \\(pid {child.pid} on "):
            open_run(settings())
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    open_run(settings()).__exit__()


def test_a_refusal_lets_the_directory_go(settings, model):
    take_steps(settings(), model)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="another configuration"):
            open_run(settings(train={"seed": 1}))
    open_run(settings()).__exit__()


def refused(config, *write):
    """A run that writes these files and then finds a mistake of the user's."""

    def begin():
        with open_run(config) as run:
            for name in write:
                (run.directory / name).write_text("{}")
            raise CheckpointError("no such module")

    with pytest.raises(CheckpointError, match="no such module"):
        begin()


def test_a_new_directory_goes_with_a_run_that_is_refused(tmp_path, settings):
    refused(settings())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ledger.jsonl", "metrics.jsonl", "notes.txt"])
def test_a_refused_runs_directory_with_anything_else_in_it_stays(tmp_path, settings, name):
    refused(settings(), name)
    assert {name, "run.json", "config.yaml"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_full_disk_at_the_start_leaves_no_directory(tmp_path, settings, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxtune.rundir.dump_config", full)
    with pytest.raises(CheckpointError, match="No space left"):
        open_run(settings())
    assert not (tmp_path / "run").exists()


def test_a_lock_whose_file_a_refused_run_took_away_holds_nothing(tmp_path, settings, monkeypatch):
    def gone(handle):
        (tmp_path / "run/run.lock").unlink()
        return try_lock(handle)

    monkeypatch.setattr("jaxtune.rundir.try_lock", gone)
    with pytest.raises(CheckpointError, match="another process trains in it"):
        open_run(settings())


def test_a_directory_that_was_there_before_the_refused_run_stays(tmp_path, settings, model):
    (tmp_path / "run").mkdir()
    refused(settings())
    assert (tmp_path / "run").is_dir()
    take_steps(settings(), model)
    before = tree(tmp_path / "run")
    refused(settings())
    assert tree(tmp_path / "run") == before


def test_without_locks_the_run_goes_on_with_a_warning(tmp_path, settings, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    open_run(settings()).__exit__()
    assert "this file system has no locks; never start two runs" in capsys.readouterr().out
    refused(settings(train={"output_dir": str(tmp_path / "other")}))
    assert (tmp_path / "other/run.json").exists()  # it may be another run's too


def test_a_damaged_record_is_named(tmp_path, settings, model):
    take_steps(settings(), model)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: not valid JSON"):
        open_run(settings())


def test_a_record_whose_configuration_is_none_is_named(tmp_path, settings, model):
    take_steps(settings(), model)
    (tmp_path / "run" / "run.json").write_text('{"config": 5}')
    with pytest.raises(CheckpointError, match=r'run\.json: "config" is int, expected an object'):
        open_run(settings())


def test_a_record_with_fields_of_another_version_is_named(tmp_path, settings, model):
    take_steps(settings(), model)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    record["config"]["train"]["magic"] = 1
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"run\.json: train\.magic: unknown key"):
        open_run(settings())


def test_a_full_disk_leaves_the_record_as_it_was(tmp_path, settings, model, monkeypatch):
    take_steps(settings(), model)
    before = tree(tmp_path / "run")

    def full(_):
        raise OSError(28, "No space left on device")

    with open_run(settings(optim={"lr": 0.5})) as run:
        run.check("data", model)
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(
            SaveError, match=r"No space left on device; make room, .* run the same command again$"
        ) as caught:
            run.begin(100)
    assert caught.value.exit_code == 1
    after = {path: data for path, data in tree(tmp_path / "run").items() if path.suffix != ".partial"}
    assert after == before


def test_a_checkpoint_can_say_what_run_it_is_of(settings, model):
    with open_run(settings()) as run:
        run.check("data", model)
        run.begin(0)
        meta = json.loads(json.dumps(run.meta))
    assert make_config(meta["config"]) == settings()
    assert meta["fingerprints"]["data"] == "data" and len(meta["fingerprints"]["model"]) == 64
    assert meta["jaxtune"]
