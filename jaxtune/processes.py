"""What the processes of one run do together: agree, and wait for one another.

Everything goes through JAX's coordination service and XLA's collectives. With one process nothing here does anything.
Process 0 decides, records and prints. Who starts the processes is clusters.py's and launch.py's business, how they
end fate.py's.
"""

import hashlib
import itertools
import json
import re
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune import __version__
from jaxtune.config import Config
from jaxtune.errors import ProcessError, listing
from jaxtune.signals import StopSignal

EVER = 365 * 24 * 3600.0  # seconds; what is waited for this long is ended by the death of its process
PATIENCE = 3600.0  # for the slowest of processes that do the same

_serial: dict[str, Iterator[int]] = defaultdict(itertools.count)


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
        client().wait_at_barrier(f"jaxtune/{name}", int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "DEADLINE_EXCEEDED" not in text:
            raise
        raise ProcessError(
            f"Process {listing(missing_from(text)) or '?'} of {count()} did not come to the point {name!r} within "
            f"{timeout:.0f} s of another: its machine is slow, or it is stuck; its own output may say more"
        ) from error


def missing_from(text: str) -> list[str]:
    """The processes that a barrier's error names."""
    return re.findall(r"^(\d+)$", text.partition("timed out task names:")[2], re.MULTILINE)


def decided_by_first(name: str, decide: Callable[[], Any]) -> Any:
    """What `decide` gives in process 0, in every process: JSON. In the others it is not called."""
    if count() == 1:
        return decide()
    key = key_of(name)
    if is_first():
        value = decide()
        client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(client().blocking_key_value_get(key, int(EVER * 1000)))


def gathered(name: str, value: Any) -> list[Any]:
    """What each process gives, in order and in every process: JSON, and short."""
    if count() == 1:
        return [value]
    key = key_of(name)
    client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    barrier(name)
    found = {int(path.rpartition("/")[2]): json.loads(text) for path, text in client().key_value_dir_get(key)}
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


def own_rows(home: NamedSharding, shape: tuple[int, int, int]) -> frozenset[int] | None:
    """Which of a batch's sequences this process has to make: those that lie on its devices.

    home: of arrays of `shape`, [micro_batches, rows, time]; sequences are counted through all micro-batches. None is
    all of them, which the first process needs for the record.
    """
    if is_first():
        return None
    places = home.addressable_devices_indices_map(shape).values()
    spans = [[range(*part.indices(size)) for part, size in zip(place[:2], shape, strict=False)] for place in places]
    return frozenset(micro * shape[1] + row for micros, rows in spans for micro in micros for row in rows)


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


def client() -> Any:
    """JAX's connection to the coordination service, which has no public name; Orbax takes it from here too."""
    return jax._src.distributed.global_state.client


def key_of(name: str) -> str:
    """A name that is used once. All processes ask for the same ones in the same order."""
    return f"jaxtune/{name}/{next(_serial[name])}"


def first_line(text: str) -> str:
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
