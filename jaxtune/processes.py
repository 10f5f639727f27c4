"""What the processes of one run do together: agree, wait for one another, and end together.

Everything goes through JAX's coordination service and XLA's collectives. With one process nothing here does anything.
Who starts them is clusters.py's and launch.py's business.

Process 0 decides, records and prints. An error of one ends all with its message and exit code: `together` posts it,
and a thread in each of the others, which may be stuck in a collective, ends its process. A process that is gone
without a word is noticed by the service when it has not been heard of for the heartbeat time.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jax
import jaxlib
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune import __version__
from jaxtune.clusters import HEARTBEAT, seconds
from jaxtune.config import Config
from jaxtune.console import console
from jaxtune.errors import LostProcess, ProcessError, explained
from jaxtune.signals import StopSignal

EVER = 365 * 24 * 3600.0  # seconds; what is waited for this long is ended by the death of its process
PATIENCE = 3600.0  # for the slowest of processes that do the same
GRACE = 1.0  # for the others to read an error before process 0, who holds the service, goes

_serial: dict[str, Iterator[int]] = defaultdict(itertools.count)
_joined: "_Joined | None" = None


def count() -> int:
    """How many processes train together."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is the process that decides, records and prints."""
    return jax.process_index() == 0


def barrier(name: str, timeout: float = PATIENCE) -> None:
    """Wait until every process is here.

    Raises:
        ProcessError: after `timeout` seconds, naming those that are not.
    """
    if count() == 1:
        return
    try:
        _client().wait_at_barrier(f"jaxtune/{name}", int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "DEADLINE_EXCEEDED" not in text:
            raise
        raise ProcessError(
            f"Not every process came to the point {name!r} within {timeout:.0f} s: {_first_line(text)}"
        ) from error


def decided_by_first(name: str, decide: Callable[[], Any]) -> Any:
    """What `decide` gives in process 0, in every process: JSON. In the others it is not called."""
    if count() == 1:
        return decide()
    key = _key(name)
    if is_first():
        value = decide()
        _client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_client().blocking_key_value_get(key, int(EVER * 1000)))


def gathered(name: str, value: Any) -> list[Any]:
    """What each process gives, in order and in every process: JSON, and short."""
    if count() == 1:
        return [value]
    key = _key(name)
    _client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    barrier(name)
    found = {int(path.rpartition("/")[2]): json.loads(text) for path, text in _client().key_value_dir_get(key)}
    return [found[process] for process in range(count())]


def compare(what: Callable[[], dict[str, str]]) -> None:
    """Refuse to go on unless all processes have the same.

    what: gives name -> value, short enough to be shown; asked only where there are several processes.

    Raises:
        ProcessError: in all of them; the message says who differs from process 0 in what.
    """
    if count() == 1:
        return
    mine = what()
    first = decided_by_first("compared", lambda: mine)
    names = [name for name in {**first, **mine} if first.get(name) != mine.get(name)]
    differences = {name: [first.get(name, "nothing"), mine.get(name, "nothing")] for name in names}
    reports = gathered("differences", {"host": socket.gethostname(), "found": differences})
    lines = [
        f"  {name}: {ours} in process {process} ({report['host']}), {theirs} in process 0 ({reports[0]['host']})"
        for process, report in enumerate(reports)
        for name, (theirs, ours) in report["found"].items()
    ]
    if lines:
        more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise ProcessError(
            "The processes were not given the same:\n" + "\n".join(lines[:20]) + more + "\n"
            "Start all of them with the same command, configuration, data, model and version"
        )


def program(config: Config) -> dict[str, str]:
    """What has to be the same everywhere before anything is read: each field of the configuration, and the code."""
    fields: dict[str, str] = {}
    for section, values in config.model_dump().items():
        fields |= {f"{section}.{name}": json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "jaxtune": __version__}
    return {**fields, **versions, "jaxtune's code (SHA-256)": _code()}


class SharedStop:
    """Whether any process was told to stop, known to all of them at the same step.

    One more collective, of a number, goes with each step where there are several processes. It is asked for before
    the step and read when the step before is done, so that the device is not kept waiting.
    """

    def __init__(self, stop: StopSignal):
        self._stop = stop
        self._asked: jax.Array | None = None

    def ask(self) -> None:
        """Say what this process was told; before a step is started."""
        if count() > 1:
            self._asked = _largest(self._own())

    def answer(self) -> int:
        """The number of the signal, or 0; in the same step in every process."""
        return self._own() if self._asked is None else int(self._asked.addressable_data(0))

    def _own(self) -> int:
        return (self._stop.signum or 0) if self._stop.requested else 0


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


class _Joined:
    """Two threads, each waiting for one thing: an error that is posted, a process that is lost."""

    def __init__(self) -> None:
        self._key = _key("run")
        self._failing = False
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._hear, self._watch)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Wait for the others, and let the threads go.

        Two barriers: the threads of the others wait at one for process 0, and that of process 0 at another for them.
        Whoever dies before breaks the one that the rest is waiting at.
        """
        self._wait_at("first" if is_first() else "others")
        self._threads[1].join()
        if is_first():
            _client().key_value_set(f"{self._key}/failed", "")
        self._threads[0].join()

    def fail(self, error: BaseException) -> NoReturn:
        """Tell the others and the person, and end this process."""
        known = explained(error)
        if known is None and isinstance(error, jax.errors.JaxRuntimeError):
            # A collective breaks when another process is gone; the service will say which, and `_watch` end this one.
            time.sleep(seconds(os.environ, HEARTBEAT) + 5)
        self._failing = True
        message, code = known or (f"{type(error).__name__}: {_first_line(str(error))}", 1)
        failure = {"process": jax.process_index(), "host": socket.gethostname(), "message": message, "code": code}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another failed before, or the service is gone
            _client().key_value_set(f"{self._key}/failed", json.dumps(failure))
        if known is None:
            message = "".join(traceback.format_exception(error)).rstrip()
        if is_first():
            time.sleep(GRACE)
        _leave(message if is_first() or known is None else "", code)

    def _hear(self) -> None:
        try:
            text = _client().blocking_key_value_get(f"{self._key}/failed", int(EVER * 1000))
        except jax.errors.JaxRuntimeError:  # the service is gone, which is `_watch`'s business
            return
        failure = json.loads(text) if text else None
        if failure is None or failure["process"] == jax.process_index():
            return
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

    def _wait_at(self, name: str) -> None:
        _client().wait_at_barrier(f"{self._key}/{name}", int(EVER * 1000))


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
    sys.stdout.flush()
    if message:
        os.write(2, f"{message}\n".encode())
    os._exit(code)


def _client() -> Any:
    """JAX's connection to the coordination service, which has no public name; Orbax takes it from here too."""
    return jax._src.distributed.global_state.client


def _key(name: str) -> str:
    """A name that is used once. All processes ask for the same ones in the same order."""
    return f"jaxtune/{name}/{next(_serial[name])}"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:500]


def _largest(value: int) -> jax.Array:
    """The largest of the processes' values, on all devices; it is not waited for."""
    spread, largest = _reduction()
    shape = (jax.device_count(),)
    return largest(jax.make_array_from_callback(shape, spread, lambda _: np.full(1, value, np.int32)))


@cache
def _reduction() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.array(jax.devices()), ("all",))
    whole = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("all")), jax.jit(lambda values: values.max(), out_shardings=whole)


@cache
def _code() -> str:
    """SHA-256 of jaxtune's own files."""
    digest, home = hashlib.sha256(), Path(__file__).parent
    for path in sorted(home.rglob("*.py")):
        digest.update(f"{path.relative_to(home).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()
