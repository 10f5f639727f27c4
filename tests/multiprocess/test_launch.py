"""The launcher: what each process is told, whose exit code it gives, and that it leaves none behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtune.errors import ConfigError
from jaxtune.launch import Group, child_environment, launch, report

SLEEP = "import time; time.sleep(60)"


def run(tmp_path, *programs: str, patience: float = 60) -> int:
    """The exit code of a launch of these Python programs."""
    group, logs = Group(), [tmp_path / f"{number}.log" for number in range(len(programs))]
    with group.passing_signals_on():
        for program, log in zip(programs, logs, strict=True):
            group.start([sys.executable, "-c", program], os.environ, log)
        group.wait(patience)
    assert all(process.returncode is not None for process in group.processes)
    return report(group, logs)


def test_all_done_is_0(tmp_path):
    assert run(tmp_path, "pass", "pass") == 0


def test_the_code_is_of_the_one_that_failed_first_and_its_last_words_are_shown(tmp_path, capfd):
    late = "import time; time.sleep(1); raise SystemExit(75)"
    assert run(tmp_path, late, "import sys; sys.exit('no\\nway')") == 1
    _, shown = capfd.readouterr()
    assert "process 1: no\nprocess 1: way\nProcess 1 of 2 failed with exit code 1" in shown


def test_one_that_is_killed_is_named_with_its_signal(tmp_path, capfd):
    late = "import time; time.sleep(1); raise SystemExit(75)"
    assert run(tmp_path, late, "import os; os.kill(os.getpid(), 9)") == 137
    assert "Process 1 of 2 was killed by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize("code", [2, 75, 130, 143])
def test_what_process_0_has_told_is_not_told_again(tmp_path, capfd, code):
    assert run(tmp_path, f"raise SystemExit({code})", f"raise SystemExit({code})") == code
    assert capfd.readouterr().err == ""


def test_one_that_hangs_on_is_ended_in_time(tmp_path):
    begun = time.monotonic()
    assert run(tmp_path, SLEEP, "raise SystemExit(3)", patience=0.5) == 3
    assert time.monotonic() - begun < 30


LAUNCHER = """
import os, sys
from pathlib import Path
from jaxtune.launch import Group, report
home = Path(sys.argv[1])
group, logs = Group(), [home / "0.log", home / "1.log"]
with group.passing_signals_on():
    for log, child in zip(logs, sys.argv[2:], strict=True):
        group.start([sys.executable, "-c", child], os.environ, log)
    print("ready", flush=True)
    group.wait(60)
sys.exit(report(group, logs))
"""
STOPPABLE = """
import signal, sys, time
from jaxtune.launch import stop_with_launcher
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(143)))
stop_with_launcher()
print("here", flush=True)
time.sleep(60)
"""


def start_launcher(home: Path, *children: str) -> subprocess.Popen:
    """children: two Python programs that print "here"; by default two that a signal lets save."""
    command = [sys.executable, "-c", LAUNCHER, str(home), *(children or (STOPPABLE, STOPPABLE))]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert launcher.stdout.readline() == b"ready\n"
    wait_for(home, "here")
    return launcher


def wait_for(home: Path, word: str) -> None:
    end = time.monotonic() + 60
    while not all(word in (home / f"{number}.log").read_text() for number in range(2)):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_sigterm_is_passed_on_to_all_and_their_code_comes_back(tmp_path):
    launcher = start_launcher(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == 143
    wait_for(tmp_path, "saved")


def test_the_others_are_not_waited_for_where_a_stop_has_ended_one_that_was_still_starting(tmp_path):
    starting = "import time; print('here', flush=True); time.sleep(60)"
    deaf = f"import signal; signal.signal(signal.SIGTERM, lambda *_: None); {starting}"
    launcher = start_launcher(tmp_path, deaf, starting)
    launcher.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert launcher.wait(timeout=60) == 143
    assert time.monotonic() - begun < 30


def test_when_the_launcher_itself_is_killed_the_processes_save_and_stop(tmp_path):
    launcher = start_launcher(tmp_path)
    launcher.kill()
    launcher.wait()
    wait_for(tmp_path, "saved")


def test_each_process_is_told_its_place_and_its_gpus():
    before = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_dump_to=x", "HOME": "/root"}
    told = child_environment(before, "127.0.0.1:1234", 1, 2, 4)
    assert told == {
        "HOME": "/root",
        "XLA_FLAGS": "--xla_dump_to=x",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234",
        "JAX_COORDINATOR_BIND_ADDRESS": "127.0.0.1:1234",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
        "JAX_LOCAL_DEVICE_IDS": "4,5,6,7",
    }
    behind_a_proxy = child_environment({"https_proxy": "http://proxy:1"}, "127.0.0.1:1234", 0, 2, 1)
    assert behind_a_proxy["no_grpc_proxy"] == "127.0.0.1"


def test_without_a_place_for_temporary_files_nothing_is_launched(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    told = "^temporary files: No such file or directory; set TMPDIR to a directory that you may write to$"
    with pytest.raises(ConfigError, match=told):
        launch(["train"], 2, 1)


def test_only_training_is_launched():
    with pytest.raises(ConfigError, match="launch starts jaxtune train; found export --run x"):
        launch(["export", "--run", "x"], 2, 1)
