"""What goes wrong in one process ends all of them, soon, with one message and the right exit code."""

import fcntl

import pytest

from tests.multiprocess.support import by_hand, configuration, finish, script, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen2")


def ended(*scripts: list[str]) -> tuple[list[int], list[str]]:
    """(exit codes, outputs) of processes that were started by hand."""
    codes, outputs = zip(*[finish(process) for process in by_hand(*scripts)], strict=True)
    return list(codes), list(outputs)


def test_an_error_of_the_users_is_told_once(model, tmp_path):
    process = start(configuration(model, tmp_path), "train.batchsize=4")
    code, output = finish(process)
    assert code == 2 and "Traceback" not in output
    assert output.count("train.batchsize: unknown key") == 1


def test_processes_with_other_configurations_are_refused(model, tmp_path):
    config = configuration(model, tmp_path)
    codes, outputs = ended(script(config), script(config, "optim.lr=0.02", "data.max_length=32"))
    assert codes == [2, 2] and "Traceback" not in outputs[0]
    assert "optim.lr: 0.02 in process 1" in outputs[0] and "0.01 in process 0" in outputs[0]
    assert "data.max_length: 32 in process 1" in outputs[0]
    assert "jaxtune's code" not in outputs[0]
    assert not (tmp_path / "run").exists()


OLD_DATA = """
import dataclasses
import jaxtune.data.loader as loader
read = loader.cached
def older(*arguments):
    found = read(*arguments)
    return dataclasses.replace(found, examples=found.examples.take(range(1, len(found.examples))))
loader.cached = older
"""


def test_processes_that_read_other_data_are_refused(model, tmp_path):
    # The same path, but other lines in it, as on a machine whose copy is an old one.
    config = configuration(model, tmp_path)
    codes, outputs = ended(script(config), script(config, fault=OLD_DATA))
    assert codes == [2, 2], outputs
    assert "the data (SHA-256)" in outputs[0]


def test_processes_that_run_other_code_are_refused_before_anything_is_read(model, tmp_path):
    config = configuration(model, tmp_path)
    changed = "import jaxtune.processes\njaxtune.processes._code = lambda: 'another'"
    codes, outputs = ended(script(config), script(config, fault=changed))
    assert codes == [2, 2], outputs
    assert "jaxtune's code (SHA-256): another in process 1" in outputs[0]
    assert "Reading" not in outputs[0]


def test_a_crash_of_another_process_is_told_by_the_first(model, tmp_path):
    fault = (
        "import jaxtune.data.loader as l\ndef broken(*_):\n    raise TypeError('not today')\nl.Dataset._fill = broken"
    )
    config = configuration(model, tmp_path)
    codes, outputs = ended(script(config), script(config, fault=fault))
    assert codes == [1, 1]
    assert "process 1 (" in outputs[0] and "TypeError: not today" in outputs[0]
    assert "Traceback" in outputs[1] and "in broken" in outputs[1]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "import jaxtune.checkpoint as broken; name = 'write_manifest'",
            "this checkpoint could not be saved: disk full",
        ),
        ("import jaxtune.tune.peft_io as broken; name = '_replace_directory'", "disk full"),
    ],
    ids=["checkpoint", "result"],
)
def test_when_the_first_cannot_write_the_others_do_not_wait_for_ever(model, tmp_path, fault, message):
    fault += "\ndef full(*_, **__):\n    raise OSError(28, 'disk full')\nsetattr(broken, name, full)"
    config = configuration(model, tmp_path, train={"steps": 4, "batch_size": 8})
    codes, outputs = ended(script(config, fault=fault), script(config))
    assert codes == [1, 1]
    assert message in outputs[0]


def test_a_directory_in_which_another_run_lives_is_refused_once(model, tmp_path):
    config = configuration(model, tmp_path)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, output = finish(start(config))
    assert code == 2 and output.count("another process trains in it") == 1


def test_a_directory_that_is_not_shared_is_refused(model, tmp_path):
    fault = "import jaxtune.rundir as r, pathlib\nr.SHARED_SECONDS = 1\nr.LOCK = 'other.lock'"
    config = configuration(model, tmp_path)
    codes, outputs = ended(script(config), script(config, fault=fault))
    assert codes == [2, 2]
    assert "on storage that the machines share" in outputs[0]


def test_one_that_never_comes_is_waited_for_only_so_long(model, tmp_path):
    config = configuration(model, tmp_path)
    absent = ["-c", "pass"]
    patience = "import os; os.environ['JAXTUNE_START_SECONDS'] = '5'"
    first, other = by_hand(script(config, fault=patience), absent)
    assert other.wait(timeout=60) == 0
    code, output = finish(first)
    assert code == 75
    assert "not all came to 127.0.0.1:" in output and "within 5 s" in output
