"""How the processes of one run end: all together. With one process nothing here does anything.

An error of one ends all with its message and exit code: `together` posts it, and a thread in each of the others, which
may be stuck in a collective, ends its process. A process that is gone without a word is noticed by JAX's coordination
service, when nothing has been heard of it for the heartbeat time; one that is there but does not go on, by those that
wait for it in a step.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import re
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax

from jaxtune.clusters import HEARTBEAT, STUCK, seconds
from jaxtune.console import console
from jaxtune.errors import LostProcess, explained, listing
from jaxtune.processes import EVER, client, count, first_line, is_first, key_of, missing_from

GRACE = 1.0  # seconds for the others to read an error before process 0, who holds the service, goes

LEAST_WAIT, TIMES = 60.0, 10  # a step is waited for so many seconds, or so many times the usual step's if that is more
TIMED = 5  # steps before what is usual is known

_joined: "_Joined | None" = None


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around all that processes do together: none is left behind when another fails or ends.

    An error in one of several processes ends them all, this one too, with its message and exit code. A SystemExit
    is taken for a decision of all. Inside another `together`, and with one process, this does nothing.
    """
    global _joined
    if _joined is not None or count() == 1:
        yield
        return
    _joined = _Joined()
    console.quiet = not is_first()
    try:
        yield
    except SystemExit:
        _joined.end()
        raise
    except BaseException as error:
        _joined.fail(error)
    else:
        _joined.end()
    finally:
        _joined = None


@contextlib.contextmanager
def waited_for(step: int) -> Iterator[None]:
    """Around a wait for the device, which may be a wait for a process that will never come."""
    if _joined is not None:
        _joined.waits = step, time.monotonic()
    try:
        yield
    finally:
        if _joined is not None:
            _joined.waits = None
            _joined.pace.step(time.monotonic())


class Pace:
    """How long a step usually takes, and so how long one is to be waited for.

    given: seconds that the environment asks for, which then hold always; first: those until enough steps were timed.
    """

    def __init__(self, given: int | None, first: int):
        self._given, self._first = given, first
        self._last: float | None = None
        self._times: deque[float] = deque(maxlen=50)

    def step(self, now: float) -> None:
        """A step is done. now: of a clock in seconds."""
        if self._last is not None:
            self._times.append(now - self._last)
        self._last = now

    @property
    def limit(self) -> float:
        """Seconds."""
        if self._given is not None:
            return self._given
        if len(self._times) < TIMED:
            return self._first
        return max(LEAST_WAIT, TIMES * statistics.median(tuple(self._times)))


class _Joined:
    """Three threads, each watching for one thing: an error that is posted, a process that is lost, a wait without end.

    waits: the step that is waited for, and since when.
    """

    def __init__(self) -> None:
        self._key = key_of("run")
        self._failing = False
        self._ended = threading.Event()
        self.waits: tuple[int, float] | None = None
        first = seconds(os.environ, STUCK)
        self.pace = Pace(first if STUCK in os.environ else None, first)
        self._abort_at_once = _delay_aborts()
        targets = self._hear, self._watch, self._time
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Wait for the others, and let the threads go.

        Two barriers: the threads of the others wait at one for process 0, and that of process 0 at another for them.
        Whoever dies before breaks the one that the rest is waiting at.
        """
        self._wait_at("first" if is_first() else "others")
        self._threads[1].join()
        self._ended.set()
        self._threads[2].join()
        if is_first():
            client().key_value_set(f"{self._key}/failed", "")
        self._threads[0].join()
        self._abort_at_once()

    def fail(self, error: BaseException) -> NoReturn:
        """Tell the others and the person, and end this process."""
        known = explained(error)
        if known is None and isinstance(error, jax.errors.JaxRuntimeError):
            # A collective breaks when another process is gone; the service will say which, and `_watch` end this one.
            time.sleep(seconds(os.environ, HEARTBEAT) + 5)
        self._failing = True
        message, code = known or (f"{type(error).__name__}: {first_line(str(error))}", 1)
        self._post(message, code)
        if known is None:
            message = "".join(traceback.format_exception(error)).rstrip()
        if is_first():
            time.sleep(GRACE)
        _leave(message if is_first() or known is None else "", code)

    def _post(self, message: str, code: int, stuck: list[str] | None = None) -> None:
        failure = {"process": jax.process_index(), "host": socket.gethostname(), "message": message, "code": code}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another failed before, or the service is gone
            client().key_value_set(f"{self._key}/failed", json.dumps({**failure, "stuck": stuck or []}))

    def _hear(self) -> None:
        try:
            text = client().blocking_key_value_get(f"{self._key}/failed", int(EVER * 1000))
        except jax.errors.JaxRuntimeError:  # the service is gone, which is `_watch`'s business
            return
        failure = json.loads(text) if text else None
        if failure is None or failure["process"] == jax.process_index():
            return
        if str(jax.process_index()) in failure["stuck"]:
            faulthandler.dump_traceback()  # where it is stuck; as the first that fails, the launcher shows it
            failure["code"] = 1
        time.sleep(GRACE if is_first() else GRACE / 2)
        if not self._failing:  # with the same error, most likely
            message = f"process {failure['process']} ({failure['host']}): {failure['message']}"
            _leave(message if is_first() else "", failure["code"])

    def _watch(self) -> None:
        try:
            self._wait_at("others" if is_first() else "first")
        except jax.errors.JaxRuntimeError as error:
            if not self._failing:
                lost = _lost(str(error))
                _leave(str(lost) if is_first() or lost.process == 0 else "", lost.exit_code)

    def _time(self) -> None:
        while not self._ended.wait(min(1.0, (limit := self.pace.limit) / 4)):
            if (waits := self.waits) and time.monotonic() - waits[1] > limit:
                self._stuck(waits[0], limit)

    def _stuck(self, step: int, limit: float) -> None:
        """Those that wait come to a barrier; who does not come is waited for."""
        missing = []
        try:
            client().wait_at_barrier(f"{self._key}/stuck", 10_000)
        except jax.errors.JaxRuntimeError as error:
            missing = missing_from(str(error))
        who = f"process {listing(missing)} of {count()}" if missing else "the connection between the processes"
        message = f"Step {step} has been waited for for {limit:.0f} s: {who} is stuck. {STUCK} sets another time"
        self._post(message, LostProcess.exit_code, missing)
        self._failing = True
        if is_first():
            time.sleep(GRACE)
        _leave(message if is_first() else "", LostProcess.exit_code)

    def _wait_at(self, name: str) -> None:
        client().wait_at_barrier(f"{self._key}/{name}", int(EVER * 1000))


def _delay_aborts() -> Callable[[], None]:
    """Leave time to say which process is lost, where JAX's service would abort this one at the same news.

    The handler of SIGABRT becomes the C library's sleep, which takes the signal's number, 6, for seconds: the thread
    that calls abort() waits, the others go on, and after that the process is aborted as ever. Where faulthandler has
    that signal, it keeps it. What is returned puts the handler back.
    """
    if os.name != "posix" or faulthandler.is_enabled():
        return lambda: None
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    return lambda: libc.signal(signal.SIGABRT, before)


def _lost(text: str) -> LostProcess:
    """What the service says when a process is gone, in our words."""
    found = re.search(r"[Tt]ask[ :](\d+)", text)
    process, silence = int(found[1]) if found else 0, seconds(os.environ, HEARTBEAT)
    how = f"nothing was heard of it for {silence} s" if found else "the connection to it broke"
    return LostProcess(
        f"Process {process} of {count()} is gone: {how}. It was killed, ran out of memory, or its machine is down; its "
        "own output may say more. The others end too: start all with the same command, and the run goes on from its "
        "last checkpoint",
        process,
    )


def _leave(message: str, code: int) -> NoReturn:
    """End this process from any thread, whatever the others are stuck in."""
    if console.is_terminal:
        console.show_cursor()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if message:
        os.write(2, f"{message}\n".encode())
    os._exit(code)
