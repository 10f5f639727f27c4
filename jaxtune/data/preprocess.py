"""JSON lines to a Megatron data set, by many processes: what tools/preprocess_data.py does, without its options.

A partition is a share of the lines with a writer and workers of its own; with several, their data sets are put
together at the end.
"""

import gzip
import multiprocessing
import os
import queue
import signal
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.megatron import DatasetWriter, open_dataset
from jaxtune.data.records import kind, without_mark
from jaxtune.data.text_files import read_line
from jaxtune.errors import DataError, listing
from jaxtune.tokenizer import load_tokenizer, without_torch

CHUNK_LINES, CHUNK_BYTES = 256, 1 << 18  # that a worker gets at once, at most, but for a longer line
_AHEAD = 4  # chunks that wait for each worker
Tell = Callable[[int, int, int, float], None]  # partition, documents, bytes of their lines, share that is done of it
_spawn = multiprocessing.get_context("spawn")  # a fork would copy threads' locks


@dataclass(frozen=True)
class Task:
    """What is to be done; every process gets it."""

    files: tuple[str, ...]  # of JSON lines, .gz or not
    keys: tuple[str, ...]  # columns, each of which becomes a data set
    prefix: str
    tokenizer: Path
    dtype: np.dtype
    special_tokens: bool = True  # those that the tokenizer puts around a text
    append_eod: bool = False
    workers: int = 1  # of each partition
    partitions: int = 1
    block: int | None = None  # lines of a partition, which lie together; None: lines are dealt out in turn

    def names(self, partition: int | None = None) -> dict[str, str]:
        """The prefix of each key's files; partition: whose, None: of all together."""
        whole = {key: f"{self.prefix}_{key}_document" for key in self.keys}
        if partition is None or self.partitions == 1:
            return whole
        # Hidden, for a part must not have the name of another data set: --output-prefix may be PREFIX_0 as well.
        return {key: str(Path(name).with_name(f".{Path(name).name}.part{partition}")) for key, name in whole.items()}


def preprocess(task: Task, tell: Tell) -> None:
    """Write the data sets of `task.names()`.

    Raises:
        DataError: an input file or a line is wrong, which the message names; or another process writes them.
        OSError: something cannot be written.
        BrokenProcessPool: a process was killed.
    """
    if task.partitions == 1:
        write_partition(task, 0, tell)
        return
    with ExitStack() as stack:
        whole = task.names().items()  # from the beginning: they keep other processes away, from the parts too
        writers = {key: stack.enter_context(DatasetWriter(name, task.dtype)) for key, name in whole}
        try:
            _write_partitions(task, tell)
            for key, writer in writers.items():
                for partition in range(task.partitions):
                    writer.add_dataset(open_dataset(task.names(partition)[key]))
        finally:
            for partition in range(task.partitions):
                for name in task.names(partition).values():
                    for ending in (".bin", ".idx", ".bin.tmp", ".idx.tmp"):  # the latter of a process that was killed
                        Path(name + ending).unlink(missing_ok=True)
        for writer in writers.values():
            writer.finalize()


# Reading


class Chunk(NamedTuple):
    """Some lines."""

    lines: list[tuple[str, int, bytes]]  # (file, number from 1, line)
    share: float  # of the partition that is read when they are


def chunks_of(task: Task, partition: int) -> Iterator[Chunk]:
    """The lines of a partition."""
    lines: list[tuple[str, int, bytes]] = []
    size, share = 0, 0.0
    for path, number, raw, after in _lines_of(task, partition):
        if lines and (len(lines) == CHUNK_LINES or size + len(raw) > CHUNK_BYTES):
            yield Chunk(lines, share)
            lines, size = [], 0
        lines.append((path, number, raw))
        size, share = size + len(raw), after
    if lines:
        yield Chunk(lines, share)


def _lines_of(task: Task, partition: int) -> Iterator[tuple[str, int, bytes, float]]:
    """(file, number, line, share of the partition that is read after it)"""
    total, before, index = sum(map(os.path.getsize, task.files)), 0, 0
    for path in task.files:
        for number, raw, position in read_lines(path):
            if task.block is None:
                owner, share = index % task.partitions, (before + position) / total
            else:
                owner, share = index // task.block, (index + 1) / task.block - partition
            if owner == partition:
                yield path, number, raw, share
            elif task.block is not None and owner > partition:
                return
            index += 1
        before += os.path.getsize(path)


def read_lines(path: str) -> Iterator[tuple[int, bytes, int]]:
    """(number, line, bytes of the file that are read) of a file, which may be compressed with gzip."""
    number = 0
    try:
        with open(path, "rb") as file, gzip.open(file) if path.endswith(".gz") else file as lines:
            for number, raw in enumerate(lines, 1):
                yield number, without_mark(raw, path) if number == 1 else raw, file.tell()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: not gzip data, or damaged: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


# Tokenising, in processes of their own


class Encoded(NamedTuple):
    """A chunk's documents. Of every key: the tokens end to end, and the lengths of each document's sequences."""

    columns: dict[str, tuple[np.ndarray, list[list[int]]]]
    documents: int
    size: int  # bytes of the lines


class Encoder:
    """Lines to tokens, in one worker."""

    def __init__(self, task: Task):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as are wanted
        self.task, self.tokenizer = task, load_tokenizer(task.tokenizer)

    def __call__(self, chunk: Chunk) -> Encoded:
        """Raises DataError with file and line where one is wrong."""
        records = [read_line(raw, path, number) for path, number, raw in chunk.lines]
        found = [record for record in records if record is not None]
        columns = {key: self._column([_sentences(*record, key) for record in found]) for key in self.task.keys}
        return Encoded(columns, len(found), sum(len(raw) for *_, raw in chunk.lines))

    def _column(self, texts: list[list[str]]) -> tuple[np.ndarray, list[list[int]]]:
        """Documents, each of sentences, as tokens. As in Megatron, what is empty gets no token."""
        encoded = iter(self._tokenise([sentence for sentences in texts for sentence in sentences]))
        documents = [[ids for _ in sentences if (ids := next(encoded))] for sentences in texts]
        for sentences in documents:
            if sentences and self.task.append_eod:
                sentences[-1].append(self.tokenizer.eos_token_id)
        tokens = [token for sentences in documents for ids in sentences for token in ids]
        return np.array(tokens, self.task.dtype), [[len(ids) for ids in sentences] for sentences in documents]

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": self.task.special_tokens, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"] if texts else []


def _sentences(where: str, record: dict[str, Any], key: str) -> list[str]:
    """The text in a column, or its sentences."""
    if key not in record:
        raise DataError(f'{where}: no column "{key}"; found {listing(record) or "none"}; set --json-keys')
    sentences = record[key] if isinstance(record[key], list) else [record[key]]
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise DataError(f'{where}: column "{key}" holds {kind(sentence)}; expected a string, or a list of them')
        try:
            sentence.encode()
        except UnicodeEncodeError:
            raise DataError(f'{where}: column "{key}" holds half of a surrogate pair, which is no text') from None
    return sentences


# Processes

_of_process: list[Any] = []  # what the process was started for


def _start_process(make: Callable[[], Any]) -> None:
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    without_torch()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    _of_process.append(make())


def _end_with_parent() -> None:
    """A pool's process waits for its work on a pipe that it and its like could write to as well, so it would wait for
    ever where the one that they work for is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(chunk: Chunk) -> Encoded:
    return _of_process[0](chunk)


def write_partition(task: Task, partition: int, tell: Tell) -> None:
    """Encode the lines of a partition with workers of its own, and write them in order."""
    with ExitStack() as stack:
        names = task.names(partition).items()
        writers = {key: stack.enter_context(DatasetWriter(name, task.dtype)) for key, name in names}
        pool = ProcessPoolExecutor(task.workers, _spawn, _start_process, (partial(Encoder, task),))
        stack.callback(pool.shutdown, cancel_futures=True)
        for encoded, share in _in_order(pool, chunks_of(task, partition), _AHEAD * task.workers):
            for key, (tokens, documents) in encoded.columns.items():
                ends = np.cumsum([sum(lengths) for lengths in documents], dtype=np.int64)
                for part, lengths in zip(np.split(tokens, ends), documents):
                    writers[key].add_document(part, lengths)
            tell(partition, encoded.documents, encoded.size, share)
        for writer in writers.values():
            writer.finalize()


def _in_order(pool: Executor, chunks: Iterator[Chunk], ahead: int) -> Iterator[tuple[Encoded, float]]:
    """The chunks encoded, with their shares; no more than `ahead` are read before they are asked for."""
    waiting: deque = deque()
    for chunk in chunks:
        waiting.append((pool.submit(_encode, chunk), chunk.share))
        if len(waiting) > ahead:
            future, share = waiting.popleft()
            yield future.result(), share
    for future, share in waiting:
        yield future.result(), share


def _write_partitions(task: Task, tell: Tell) -> None:
    """Each partition in a process of its own; when one fails the others stop at their next chunk."""
    told, stop = _spawn.Queue(), _spawn.Event()
    with ProcessPoolExecutor(task.partitions, _spawn, _start_process, (partial(_Reporter, told, stop),)) as pool:
        running = [pool.submit(_write_reporting, task, partition) for partition in range(task.partitions)]
        try:
            while running:
                try:
                    tell(*told.get(timeout=0.1))
                except queue.Empty:
                    for future in [future for future in running if future.done()]:
                        future.result()
                        running.remove(future)
        finally:
            stop.set()


class _Stopped(Exception):
    """Another partition has failed, or the user has had enough."""


class _Reporter(NamedTuple):
    """Tells the first process how far a partition is."""

    told: Any  # a queue
    stop: Any  # an event

    def __call__(self, *progress) -> None:
        if self.stop.is_set():
            raise _Stopped
        self.told.put(progress)


def _write_reporting(task: Task, partition: int) -> None:
    write_partition(task, partition, _of_process[0])
