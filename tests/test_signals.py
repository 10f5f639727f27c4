"""One signal finishes the step, two stop at once; tried on real processes with real signals."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxtune.signals import StopSignal

LOOP = """
import sys, time
from jaxtune.signals import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saved", flush=True)
sys.exit(stop.exit_code)
"""

# A long call into C that does not come back to Python, as XLA's compiler is one: the GIL is free meanwhile.
BUSY = """
import ctypes, sys
from jaxtune.signals import StopSignal
libc = ctypes.CDLL(None)
with StopSignal() as stop:
    print("ready", flush=True)
    for _ in range(100):
        libc.usleep(300_000)
        ctypes.CDLL(None).poll(None, 0, 20_000)
"""


def start(code):
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_lets_the_loop_finish(number, code):
    child = start(LOOP)
    child.send_signal(number)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == code
    assert f"{number.name}: finishing this step and saving; once more stops at once" in output
    assert output.endswith("saved\n")


def test_the_second_signal_stops_a_process_that_is_busy_in_a_library():
    child = start(BUSY)
    child.send_signal(signal.SIGTERM)
    assert "finishing this step" in child.stdout.readline()  # told at once, though Python's handlers cannot run
    child.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert child.wait(timeout=60) == 143
    assert time.monotonic() - started < 5


def test_afterwards_signals_mean_what_they_meant_before():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert not stop.requested and stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(500):
            if stop.requested:
                break
            time.sleep(0.01)
        assert stop.requested and stop.exit_code == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_in_another_thread_it_does_nothing_and_does_not_fail():
    seen = []

    def work():
        with StopSignal() as stop:
            seen.append(stop.requested)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False] and signal.getsignal(signal.SIGTERM) == before
