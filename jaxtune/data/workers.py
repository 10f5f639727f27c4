"""Processes that tokenise side by side. They are programs of their own, not multiprocessing's: a script that trains
needs no main guard, a notebook can start them too, and nothing is pickled."""

import contextlib
import json
import os
import queue
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxtune.data.child import start
from jaxtune.data.encode import Lengths
from jaxtune.data.examples import Examples
from jaxtune.data.formats import Row
from jaxtune.data.worker import read_answer
from jaxtune.errors import DataError

_ROOT = Path(__file__).resolve().parents[2]  # where the package lies


class Workers:
    """`count` processes, told the same. Use it in a `with`."""

    def __init__(self, count: int, told: dict[str, Any]):
        """told: worker.hello's."""
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._count, self._line = count, json.dumps(told).encode() + b"\n"
        self._all: list[_Process] = []

    def __enter__(self) -> "Workers":
        self._threads = ThreadPoolExecutor(self._count, "tokenise")
        try:
            for _ in range(self._count):
                self._all.append(_Process(self._line))
                self._idle.put(self._all[-1])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.close()

    def encode(self, chunks: Iterable[list[Row]]) -> Iterator[tuple[Examples, Lengths]]:
        """What encode_chunk gives for each chunk, in order. Few chunks are held at any time.

        Raises:
            DataError: of the first chunk that has a fault; or a process ended.
        """
        waiting: deque[Future] = deque()
        failed = None
        chunks = iter(chunks)
        while True:
            try:
                chunk = next(chunks, None)
            except DataError as error:  # of a row that cannot be read; those before it have their say first
                failed = error
                break
            if chunk is None:
                break
            waiting.append(self._threads.submit(self._ask, chunk))
            if len(waiting) > 2 * self._count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        if failed is not None:
            raise failed

    def _ask(self, chunk: list[Row]) -> tuple[Examples, Lengths]:
        process = self._idle.get()
        try:
            return process.ask(chunk)
        finally:
            self._idle.put(process)


class _Process:
    def __init__(self, first: bytes):
        # -P: nothing in the user's directory is taken for a module; the package is found all the same.
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-P", "-m", "jaxtune.data.worker"]
        # A Ctrl-C is for this process, which then ends the others.
        self._process = start(command, "a process that tokenises", env=environment, process_group=0)
        self._first: bytes | None = first

    def ask(self, chunk: list[Row]) -> tuple[Examples, Lengths]:
        """One chunk's answer."""
        where = f"{chunk[0].where} to {chunk[-1].where}"
        assert self._process.stdout is not None
        try:
            if self._first is not None:
                self._exchange(self._first, where)
                self._first = None
            head = self._exchange(json.dumps([asdict(row) for row in chunk]).encode() + b"\n", where)
            return read_answer(head, self._process.stdout)
        except (EOFError, BrokenPipeError):
            raise DataError(f"{where}: {self._end()}") from None

    def _exchange(self, line: bytes, where: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        head = self._process.stdout.readline()
        if not head.endswith(b"\n"):
            raise EOFError
        answer = json.loads(head)
        if "error" in answer:
            raise DataError(answer["error"])
        if "crash" in answer:
            raise RuntimeError(f"{where}: a process that tokenises failed:\n{answer['crash']}")
        return answer

    def _end(self) -> str:
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        hint = "; did the machine run out of memory?" if code == -signal.SIGKILL else ""
        return f"a process that tokenises these rows ended ({how}){hint}; run the same command again"

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # what was not sent
            self._process.communicate()
