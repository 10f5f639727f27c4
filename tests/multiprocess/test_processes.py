"""What processes agree on, and that one process alone agrees with itself at once."""

import json
import signal
import subprocess
import sys

import jax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxtune import processes
from jaxtune.fate import Pace, _lost, together
from jaxtune.processes import SharedStop
from jaxtune.signals import StopSignal
from tests.multiprocess.support import by_hand, finish


@pytest.fixture
def no_service(monkeypatch):
    """Whoever asks the service in a process that is alone fails."""
    monkeypatch.setattr(processes, "client", lambda: pytest.fail("the service was asked"))


@pytest.mark.usefixtures("no_service")
def test_one_process_asks_nobody():
    processes.barrier("here")
    assert processes.decided_by_first("number", lambda: 3) == 3
    assert processes.gathered("number", 4) == [4]
    processes.compare(lambda: pytest.fail("nothing is compared"))
    with together(), pytest.raises(KeyError):
        raise KeyError
    stop = StopSignal()
    told = SharedStop(stop)
    told.ask()
    assert told.answer() == 0
    stop.requested, stop.signum = True, signal.SIGTERM
    assert told.answer() == signal.SIGTERM, "of this very step"


def test_the_first_process_makes_all_rows_and_another_those_of_its_devices(monkeypatch):
    mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices())
    home = NamedSharding(mesh, PartitionSpec(None, "data", "context"))
    assert processes.own_rows(home, (2, 4, 64)) is None
    monkeypatch.setattr(processes, "is_first", lambda: False)
    assert processes.own_rows(home, (2, 4, 64)) == set(range(8))


@pytest.mark.parametrize(
    ("text", "process", "words"),
    [
        ("Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout.", 1, "for 100 s"),
        ("UNAVAILABLE: Failed to send RPC to coordination service. Either the leader", 0, "the connection to it broke"),
    ],
)
def test_a_process_that_is_gone_is_named(text, process, words):
    error = _lost(text)
    assert error.process == process and error.exit_code == 75
    assert f"Process {process} of" in str(error) and words in str(error)


ABORTS = """
import ctypes, os, sys, threading, time
from jaxtune.fate import _delay_aborts

at_once = _delay_aborts()
if "at once" in sys.argv:
    at_once()
threading.Thread(target=ctypes.CDLL(None).abort, daemon=True).start()
time.sleep(float(sys.argv[1]))
os._exit(75)
"""


def test_an_abort_waits_for_the_words_about_it_and_for_no_more_than_that():
    begin, ways = [sys.executable, "-c", ABORTS], (["0.5"], ["60"], ["0.5", "at once"])
    started = [subprocess.Popen([*begin, *way]) for way in ways]
    assert [process.wait(50) for process in started] == [75, -signal.SIGABRT, -signal.SIGABRT]


def test_the_hash_of_the_code_is_of_every_file_and_of_its_name(monkeypatch, tmp_path):
    def hashed(**files):
        home = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            path = home / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".py").write_text(text)
        monkeypatch.setattr(processes, "__file__", str(home / "processes.py"))
        return processes._code.__wrapped__()

    same = hashed(processes="a = 1", parallel__ring="b = 2")
    assert hashed(processes="a = 1", parallel__ring="b = 2") == same
    others = [
        hashed(processes="a = 1", parallel__ring="b = 3"),
        hashed(processes="a = 1", parallel__rung="b = 2"),
        hashed(processes="a = 1"),
    ]
    assert len({same, *others}) == 4


TWO = """
import json, os, signal, sys, time
from jaxtune.clusters import find_place, start
place = find_place(os.environ)
start(place)
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtune import processes
from jaxtune.fate import together
from jaxtune.signals import StopSignal
me = place.process
found = {}
with together():
    found["decided"] = [processes.decided_by_first("x", lambda: me + 5) for _ in range(2)]
    found["gathered"] = [processes.gathered("y", me + n) for n in range(2)]
    processes.barrier("again")
    processes.barrier("again")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    home = NamedSharding(mesh, PartitionSpec(None, "data", None))
    found["rows"] = sorted(processes.own_rows(home, (2, 4, 8)) or [])
    with StopSignal() as stop:
        told, found["stops"] = processes.SharedStop(stop), []
        for step in range(4):
            if step == 2 and me == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                while not stop.requested:
                    time.sleep(0.01)
            told.ask()
            found["stops"].append(told.answer())
    if me == 0:
        try:
            processes.barrier("lonely", timeout=1)
        except processes.ProcessError as error:
            found["missing"] = str(error)
    print("FOUND" + json.dumps(found), flush=True)
"""


STUCK = """
import os, signal, sys, time
os.environ |= {"JAXTUNE_STUCK_SECONDS": "2", "JAXTUNE_HEARTBEAT_SECONDS": "60"}
from jaxtune.clusters import find_place, start
place = find_place(os.environ)
start(place)
from jaxtune import fate, processes
from jaxtune.signals import StopSignal
with fate.together():
    for step in (1, 2):
        told = processes.SharedStop(StopSignal())
        while step == 2 and place.process == 1:
            if sys.argv[1] == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.1)
        told.ask()
        with fate.waited_for(step):
            told.answer()
"""


def test_a_process_that_does_not_go_on_is_named_and_says_where_it_is():
    script = ["-c", STUCK, "asleep"]
    first, second = [finish(process) for process in by_hand(script, script)]
    assert first[0] == 75 and second[0] == 1
    assert "Step 2 has been waited for for 2 s: process 1 of 2 is stuck" in first[1]
    assert 'File "<string>", line 15 in <module>' in second[1]


def test_a_process_that_is_stopped_is_named_before_its_heartbeat_is_missed():
    script = ["-c", STUCK, "stopped"]
    waiting, stopped = by_hand(script, script)
    try:
        code, output = finish(waiting)
        assert stopped.poll() is None
    finally:
        stopped.kill()
        stopped.communicate()
    assert code == 75
    assert "Step 2 has been waited for for 2 s: process 1 of 2 is stuck" in output


def test_a_step_is_waited_for_ten_times_as_long_as_usual_and_a_minute_at_least():
    pace, now = Pace(given=None, first=1800), 0.0
    limits = []
    for seconds in (300, 20, 20, 20, 20, 400, 20):  # the first step has what came before it; one has an evaluation
        now += seconds
        pace.step(now)
        limits.append(pace.limit)
    assert limits == [1800] * 5 + [200.0] * 2
    for _ in range(50):
        now += 0.5
        pace.step(now)
    assert pace.limit == 60
    assert Pace(given=2, first=2).limit == 2


def test_two_processes_agree():
    ends = [finish(process) for process in by_hand(["-c", TWO], ["-c", TWO])]
    assert [code for code, _ in ends] == [0, 0], ends
    first, second = (json.loads(output.partition("FOUND")[2].splitlines()[0]) for _, output in ends)
    assert first["decided"] == second["decided"] == [5, 5]
    assert first["gathered"] == second["gathered"] == [[n, n + 1] for n in range(2)]
    assert first["stops"] == second["stops"] == [0, 0, signal.SIGTERM, signal.SIGTERM]
    assert (first["rows"], second["rows"]) == ([], [2, 3, 6, 7])
    assert "Process 1 of 2 did not come to the point 'lonely' within 1 s" in first["missing"]
