"""Saving while training goes on, and finding the last whole checkpoint after whatever happened."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.checkpoint import Checkpointer, latest_valid, problems, read_meta, restore, saved_steps
from jaxtune.errors import CheckpointError, SaveError
from jaxtune.tune.low_rank import LowRank


def make_state(seed=0):
    """What a step changes: adapters in float32, a norm in bfloat16, moments, counters; None where frozen."""
    a, b, norm = (jax.random.normal(key, (3, 16, 8)) for key in jax.random.split(jax.random.key(seed), 3))
    trainable = {
        "stacks": {"0": {"q_proj": {"weight": LowRank(None, a, b, None), "bias": None}}},
        "norm": {"weight": norm.astype(jnp.bfloat16)},
    }
    guard = {"bad_in_a_row": jnp.int32(seed), "skipped": jnp.int32(3)}
    return {"trainable": trainable, "optimizer": optax.adam(1e-3).init(trainable), "guard": guard}


def abstract_of(state, sharding=None):
    place = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding or array.sharding)  # noqa: E731
    return jax.tree.map(place, state)


def assert_same(found, expected):
    """The same structure, types and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert mine.dtype == other.dtype
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def checkpointer(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints", every=10, keep=2)
    yield checkpointer
    checkpointer.close()


def test_a_state_comes_back_bit_for_bit_in_its_own_structure(checkpointer):
    state = make_state()
    state["trainable"]["norm"]["weight"] = state["trainable"]["norm"]["weight"].at[0, 0].set(jnp.nan)
    checkpointer.save(10, state, {"data": "æ", "numbers": [1, None]}, wait=True)
    assert checkpointer.latest_valid() == 10
    assert_same(checkpointer.restore(10, abstract_of(state)), state)
    assert read_meta(checkpointer.directory, 10) == {"data": "æ", "numbers": [1, None]}


def test_saves_are_due_every_so_many_steps(checkpointer):
    assert [step for step in range(1, 31) if checkpointer.due(step)] == [10, 20, 30]


def test_the_next_step_may_overwrite_the_arrays_as_soon_as_save_returns(checkpointer):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    make = lambda: {"w": jax.random.normal(jax.random.key(0), (2000, 1000)), "b": jnp.arange(100_000)}  # noqa: E731
    step(make())  # compiled: the next call begins at once
    state, expected = jax.block_until_ready(make()), jax.tree.map(np.asarray, make())
    places = {name: array.unsafe_buffer_pointer() for name, array in state.items()}
    checkpointer.save(10, state, {})
    given = step(state)
    assert {name: array.unsafe_buffer_pointer() for name, array in given.items()} == places  # it did overwrite them
    checkpointer.wait()
    assert_same(restore(checkpointer.directory, 10, abstract_of(given)), expected)


@pytest.mark.parametrize("layouts", [((8, 1), (2, 4)), ((2, 4), (4, 2)), ((1, 8), (8, 1)), ((4, 2), (1, 1))])
def test_a_state_moves_to_another_mesh_bit_for_bit(checkpointer, layouts):
    def sharding(shape):
        devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
        return NamedSharding(jax.sharding.Mesh(devices, ("fsdp", "tensor")), PartitionSpec(None, "fsdp", "tensor"))

    old, new = map(sharding, layouts)
    values = make_state()["trainable"]
    state = jax.tree.map(lambda array: jax.device_put(array, old), values)
    checkpointer.save(10, state, {}, wait=True)
    found = checkpointer.restore(10, abstract_of(values, new))
    assert_same(found, values)
    assert all(array.sharding == new for array in jax.tree.leaves(found))


def test_what_does_not_fit_is_refused_by_name(checkpointer):
    state = make_state()
    checkpointer.save(10, state, {}, wait=True)
    other = abstract_of({"trainable": state["trainable"], "optimizer": state["optimizer"], "extra": jnp.zeros(3)})
    other["trainable"]["norm"]["weight"] = jax.ShapeDtypeStruct((3, 16, 9), jnp.float32)
    with pytest.raises(CheckpointError) as caught:
        checkpointer.restore(10, other)
    message = str(caught.value)
    assert f"{checkpointer.directory / '10'}: this checkpoint is of another model or tuning method" in message
    assert "extra: not in the checkpoint" in message
    assert "guard/skipped: in the checkpoint alone" in message
    assert "trainable/norm/weight: saved as bfloat16[3, 16, 8], now float32[3, 16, 9]" in message


def test_a_reader_may_ask_for_a_part(checkpointer):
    state = make_state()
    checkpointer.save(10, state, {}, wait=True)
    part = {"trainable": {"norm": state["trainable"]["norm"]}}
    assert_same(restore(checkpointer.directory, 10, abstract_of(part), partial=True), part)


def test_no_python_class_is_stored(checkpointer):
    checkpointer.save(10, make_state(), {}, wait=True)
    text = b"".join(path.read_bytes() for path in checkpointer.directory.rglob("*") if path.is_file())
    assert b"LowRank" not in text and b"ScaleByAdamState" not in text and b"jaxtune" not in text


def test_old_checkpoints_go_after_the_new_one_is_whole(checkpointer):
    for step in (10, 20, 30, 40):
        checkpointer.save(step, make_state(step), {}, wait=True)
        assert saved_steps(checkpointer.directory) == [s for s in (10, 20, 30, 40) if step - 20 < s <= step]
    assert sorted(path.name for path in checkpointer.directory.iterdir()) == ["30", "40"]


def test_at_least_two_are_kept(tmp_path):
    with pytest.raises(ValueError, match="keep at least 2"):
        Checkpointer(tmp_path, 1, 1)


def test_a_small_save_is_quick(checkpointer):
    checkpointer.save(10, make_state(), {}, wait=True)
    start = time.perf_counter()
    checkpointer.save(20, make_state(), {}, wait=True)
    assert time.perf_counter() - start < 1.0  # 0.15 s on a quiet machine


def test_a_step_that_is_there_and_whole_is_not_saved_again(checkpointer):
    checkpointer.save(10, make_state(), {"first": True}, wait=True)
    checkpointer.save(10, make_state(), {"first": False}, wait=True)
    assert read_meta(checkpointer.directory, 10) == {"first": True}


def test_a_directory_without_checkpoints_has_no_latest(tmp_path):
    assert latest_valid(tmp_path / "nowhere") is None
    (tmp_path / "300.saving").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert latest_valid(tmp_path) is None


def test_what_a_cut_off_save_or_deletion_left_is_cleaned_and_nothing_else_is(tmp_path):
    for name in ("300.saving", "100.deleting", "my.saving", "100.backup"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    Checkpointer(tmp_path, 1, 2).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100.backup", "my.saving"]


def test_reading_a_run_that_is_alive_cleans_nothing(tmp_path):
    (tmp_path / "300.saving").mkdir()
    latest_valid(tmp_path)
    assert (tmp_path / "300.saving").is_dir()


def two_saves(directory):
    checkpointer = Checkpointer(directory, 1, 2)
    checkpointer.save(1, make_state(1), {"step": 1}, wait=True)
    checkpointer.save(2, make_state(2), {"step": 2}, wait=True)
    checkpointer.close()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_any_damaged_file_means_going_back_aloud(tmp_path, capsys, damage):
    two_saves(tmp_path / "good")
    files = [path.relative_to(tmp_path / "good") for path in (tmp_path / "good" / "2").rglob("*") if path.is_file()]
    assert len(files) > 8
    for index, name in enumerate(files):
        home = tmp_path / str(index)
        shutil.copytree(tmp_path / "good", home)
        damage(home / name)
        assert latest_valid(home) == 1, name
        spoken = capsys.readouterr().out
        assert f"{home / '2'}: this checkpoint is damaged: " in spoken and name.name in spoken
        assert "going back to the checkpoint of step 1" in spoken
        with pytest.raises(CheckpointError, match="damaged"):
            restore(home, 2, abstract_of(make_state()))
    assert_same(restore(home, 1, abstract_of(make_state())), make_state(1))


def test_a_checkpoint_under_another_steps_name_is_damaged(tmp_path):
    two_saves(tmp_path)
    (tmp_path / "2").rename(tmp_path / "7")
    assert problems(tmp_path, 7) == ["it is the checkpoint of step 2"]
    assert latest_valid(tmp_path) == 1


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    two_saves(tmp_path)
    flip(next((tmp_path / "2" / "state" / "d").iterdir()))
    checkpointer = Checkpointer(tmp_path, 1, 2)
    assert checkpointer.latest_valid() == 1
    checkpointer.save(2, make_state(5), {}, wait=True)
    assert checkpointer.latest_valid() == 2
    assert_same(checkpointer.restore(2, abstract_of(make_state())), make_state(5))
    checkpointer.close()


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(tmp_path):
    two_saves(tmp_path)
    flip(next((tmp_path / "2" / "state" / "d").iterdir()))
    checkpointer = Checkpointer(tmp_path, 1, 2)
    assert checkpointer.latest_valid() == 1
    checkpointer.save(3, make_state(3), {}, wait=True)
    assert saved_steps(tmp_path) == [1, 3]
    checkpointer.close()


def test_when_all_are_damaged_the_run_does_not_begin_again_in_silence(tmp_path):
    two_saves(tmp_path)
    for step in (1, 2):
        truncate(tmp_path / str(step) / "meta.json")
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged \(steps 2, 1\); bring back their files"):
        latest_valid(tmp_path)


def test_a_file_where_the_directory_should_be_fails_the_save_with_its_name(tmp_path):
    (tmp_path / "file").write_text("")
    checkpointer = Checkpointer(tmp_path / "file" / "checkpoints", 1, 2)
    with pytest.raises(SaveError, match="file/checkpoints/1: this checkpoint could not be saved: Not a directory"):
        checkpointer.save(1, make_state(), {})
    checkpointer.close()


def test_checkpoints_that_may_not_be_read_are_told(tmp_path, forbid):
    forbid(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        latest_valid(tmp_path)


def test_a_full_disk_is_told_before_anything_is_written(checkpointer, monkeypatch):
    usage = type("Usage", (), {"free": 5_000_000})()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    state = {"w": jnp.zeros((1000, 1000))}
    with pytest.raises(CheckpointError, match="no room for 3 checkpoints: 12 MB are needed, and 5 MB are free"):
        checkpointer.preflight(state)
    checkpointer.save(10, state, {}, wait=True)  # one has room
    with pytest.raises(
        SaveError, match="8 MB are needed, and 5 MB are free on the disk; the last checkpoint is step 10"
    ):
        checkpointer.save(20, {"w": jnp.zeros((2000, 1000))}, {})
    assert sorted(path.name for path in checkpointer.directory.iterdir()) == ["10"]


def test_what_is_needed_reads_as_more_than_what_is_free(checkpointer, monkeypatch):
    usage = type("Usage", (), {"free": 11_999_999})()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="12 MB are needed, and 11 MB are free"):
        checkpointer.preflight({"w": jnp.zeros((1000, 1000))})


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(checkpointer, monkeypatch, capsys):
    for step in (10, 20):
        checkpointer.save(step, make_state(), {}, wait=True)
    monkeypatch.setattr("jaxtune.checkpoint._remove", lambda home: (_ for _ in ()).throw(OSError(30, "Read-only")))
    checkpointer.save(30, make_state(), {}, wait=True)
    assert saved_steps(checkpointer.directory) == [10, 20, 30]
    assert (
        f"{checkpointer.directory / '10'}: this old checkpoint could not be deleted: Read-only"
        in capsys.readouterr().out
    )


CHILD = """
import os, signal, sys, time
from pathlib import Path
import jax, numpy as np
import jaxtune.checkpoint as module
from orbax.checkpoint import PyTreeCheckpointHandler

directory, point = Path(sys.argv[1]), sys.argv[2]
state = lambda seed: {"w": np.random.default_rng(seed).standard_normal((300, 1000), np.float32)}

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def half_removed(path, **kwargs):
    if path == directory / "1.deleting" and path.exists():
        next(file for file in path.rglob("*") if file.is_file()).unlink()
        die()

def first_file_written():
    while not any(path.stat().st_size for path in directory.rglob("3.saving/*/*/d/*")):
        pass
    die()

checkpointer = module.Checkpointer(directory, 1, 2)
for step in (1, 2):
    checkpointer.save(step, state(step), {}, wait=True)
if point == "before the write":
    checkpointer._orbax.save = die
elif point == "during the write":
    import threading
    threading.Thread(target=first_file_written, daemon=True).start()
elif point == "before orbax commits":
    PyTreeCheckpointHandler.finalize = die
elif point == "before the manifest":
    module.write_manifest = die
elif point == "before the rename":
    Path.rename = die
elif point == "after the rename":
    module.Checkpointer._prune = die
elif point == "during the deletion of the old":
    module.shutil.rmtree = half_removed
elif point == "file size limit":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    one = state
    state = lambda seed: {name: one(seed) for name in "abcdefgh"}  # seven fail when nobody waits for them
checkpointer.save(3, state(3), {})
for _ in range(600):
    time.sleep(0.1)
    try:
        checkpointer.check_errors()
    except module.SaveError as error:
        print(error)
        checkpointer.close()
        sys.exit(error.exit_code)
"""


def run_child(directory, point):
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(directory), point], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("point", "last"),
    [
        ("before the write", 2),
        ("during the write", 2),
        ("before orbax commits", 2),
        ("before the manifest", 2),
        ("before the rename", 2),
        ("after the rename", 3),
        ("during the deletion of the old", 3),
    ],
)
def test_after_a_kill_inside_a_save_the_last_committed_one_is_found(tmp_path, point, last):
    child = run_child(tmp_path, point)
    assert child.returncode == -9, child.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"1", "2", "3"}
    assert bool(left) == (point != "after the rename")  # it did die in the middle
    checkpointer = Checkpointer(tmp_path, 1, 2)
    assert checkpointer.latest_valid() == last
    assert {path.name for path in tmp_path.iterdir()} <= {"1", "2", "3"}
    expected = {"w": np.random.default_rng(last).standard_normal((300, 1000), np.float32)}
    assert_same(checkpointer.restore(last, jax.eval_shape(lambda: expected)), expected)
    checkpointer.save(3, {"w": np.zeros((300, 1000), np.float32)}, {}, wait=True)
    assert checkpointer.latest_valid() == 3
    checkpointer.close()


def test_a_write_that_fails_in_the_background_is_raised_by_the_next_check_with_its_path(tmp_path):
    child = run_child(tmp_path, "file size limit")
    assert child.returncode == 1, child.stderr
    assert f"{tmp_path / '3'}: this checkpoint could not be saved: " in child.stdout
    assert "File too large" in child.stdout and "the last checkpoint is step 2" in child.stdout
    assert "Traceback" not in child.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert latest_valid(tmp_path) == 2


def test_a_failure_is_raised_once_and_the_next_save_can_succeed(checkpointer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("jaxtune.checkpoint.write_manifest", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
        checkpointer.save(10, make_state(), {})
        with pytest.raises(SaveError, match="No space; there is no checkpoint yet"):
            checkpointer.wait()
    checkpointer.check_errors()
    checkpointer.save(20, make_state(), {}, wait=True)
    assert checkpointer.latest_valid() == 20


def test_a_process_that_has_closed_has_no_thread_left_that_it_would_wait_for(tmp_path):
    code = (
        "import threading, numpy as np; from pathlib import Path; from jaxtune.checkpoint import Checkpointer\n"
        f"c = Checkpointer(Path({str(tmp_path)!r}), 1, 2); c.save(1, {{'w': np.ones(3)}}, {{}}); c.close()\n"
        "print([thread.name for thread in threading.enumerate() if not thread.daemon])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == "['MainThread']\n"
    assert latest_valid(tmp_path) == 1 and "Traceback" not in child.stderr


def test_a_manifest_lists_every_file_with_its_size(tmp_path):
    two_saves(tmp_path)
    manifest = json.loads((tmp_path / "2" / "manifest.json").read_text())
    files = {
        p.relative_to(tmp_path / "2").as_posix(): p.stat().st_size for p in (tmp_path / "2").rglob("*") if p.is_file()
    }
    assert {name: entry[0] for name, entry in manifest["files"].items()} == {
        name: size for name, size in files.items() if name != "manifest.json"
    }
    assert manifest["arrays"]["trainable/stacks/0/q_proj/weight/a"] == ["float32", 3, 16, 8]
    assert os.path.commonpath(list(files)) == ""
