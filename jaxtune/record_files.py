"""The files of a run's record: JSON lines that a kill cannot spoil, and TensorBoard events.

What goes into them is metrics.py's business.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from jaxtune.console import warn
from jaxtune.errors import CheckpointError
from jaxtune.files import check_readable

Row = dict[str, Any]


class LineFile:
    """A file of JSON lines. Each line is one write at a known offset: a kill tears the last line at most, and what
    could not be written whole leaves the lines as they were."""

    END = b"}\n"

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._size = os.fstat(self._file).st_size

    def append(self, row: Row) -> None:
        self._write(self._size, json.dumps(row, allow_nan=False))

    def amend(self, fields: Row) -> None:
        """Add fields to the last line, by one write over its closing brace."""
        self._write(self._size - len(self.END), ", " + json.dumps(fields, allow_nan=False)[1:])

    def _write(self, offset: int, text: str) -> None:
        data = text.encode() + b"\n"
        try:
            written = os.pwrite(self._file, data, offset)
            if written != len(data):
                raise OSError(f"{written} of {len(data)} bytes fitted")
        except OSError:
            os.pwrite(self._file, self.END[: self._size - offset], offset)  # needs no room: it was there before
            os.ftruncate(self._file, self._size)
            raise
        self._size = offset + len(data)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def read_lines(path: Path, last_step: int | None = None) -> list[Row]:
    """The rows of a file of JSON lines up to `last_step`, or all; what a kill tore off at the end is not one.

    A file that is not there, or is no regular one, has no rows.

    Raises:
        CheckpointError: it cannot be read.
    """
    return _read(path, last_step)[0]


def rewind(path: Path, last_step: int) -> list[Row]:
    """Drop all after `last_step` from a file, and give the rows that are left.

    The file is replaced as a whole or not at all, and left alone when there is nothing to drop.
    """
    rows, size = _read(path, last_step)
    if path.is_file() and size != path.stat().st_size:
        _cut(path, size)
    return rows


def _read(path: Path, last_step: int | None) -> tuple[list[Row], int]:
    """(rows, the bytes that they take)."""
    rows: list[Row] = []
    size = 0
    if path.is_file():
        check_readable(path, CheckpointError)
        with path.open("rb") as file:
            for line in file:
                row = _parse(line)
                if row is None or (last_step is not None and row["step"] > last_step):
                    break
                rows.append(row)
                size += len(line)
    return rows, size


def _parse(line: bytes) -> Row | None:
    """The object on a whole line; None for a torn one."""
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        if line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None


def _cut(path: Path, size: int) -> None:
    partial = path.with_name(path.name + ".partial")
    with path.open("rb") as old, partial.open("wb") as new:
        new.write(old.read(size))
        new.flush()
        os.fsync(new.fileno())
    partial.replace(path)


class TensorBoard:
    """Scalars in an events file, written at once: tensorboardX's own writer queues them to a thread, and waits
    for ever when that thread has died of a full disk.

    step: of the checkpoint that the run goes on from; TensorBoard hides what older files hold after it.
    """

    TRAIN = ("loss", "lr", "grad_norm", "tokens_per_second", "data_wait_seconds", "loss_scale")
    TAGS = {name: f"train/{name}" for name in TRAIN} | {"eval_loss": "eval/loss"}

    def __init__(self, directory: Path, step: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        directory.mkdir(exist_ok=True)
        self._step = step
        self._writer = RecordWriter(str(directory / self._name(directory)))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._writer.flush()

    @staticmethod
    def _name(directory: Path) -> str:
        """Of a file behind all that are there, also where the clock was set back: TensorBoard reads them by name, and
        nothing of one that stands before what it has read."""
        found = (re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in directory.iterdir())
        newest = max((int(one[1]) for one in found if one), default=0)
        return f"events.out.tfevents.{max(int(time.time()), newest + 1)}.{socket.gethostname()}"

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())

    def append(self, row: Row) -> None:
        self._step = row["step"]
        self.amend(row)

    def amend(self, fields: Row) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        values = {tag: fields[name] for name, tag in self.TAGS.items() if fields.get(name) is not None}
        values |= {f"sources/{name}": count for name, count in fields.get("source_examples", {}).items()}
        for tag, value in values.items():
            self._write(Event(wall_time=time.time(), step=self._step, summary=scalar(tag, value)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Writer(Protocol):
    def append(self, row: Row) -> None: ...
    def amend(self, fields: Row) -> None: ...
    def close(self) -> None: ...


class Lenient:
    """A writer whose errors are told once and then endured: a full disk must not stop the training."""

    def __init__(self, path: Path, make: Callable[[Path], Writer]):
        self._path, self._warned = path, False
        self._writer: Writer | None = None
        with self._enduring():
            self._writer = make(path)

    def append(self, row: Row) -> None:
        with self._enduring():
            if self._writer:
                self._writer.append(row)

    def amend(self, fields: Row) -> None:
        with self._enduring():
            if self._writer:
                self._writer.amend(fields)

    def close(self) -> None:
        with self._enduring():
            if self._writer:
                self._writer.close()
        self._writer = None

    @contextlib.contextmanager
    def _enduring(self):
        try:
            yield
        except OSError as error:
            if not self._warned:
                warn(f"{self._path} cannot be written: {error.strerror or error}; training goes on without it")
            self._warned = True
