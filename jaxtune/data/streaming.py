"""Data that is too large to be tokenised first: rows are read, tokenised and packed as steps need them.

Rows come in blocks of data.shuffle_buffer, one epoch after another, or out of the sources by their weights, each of
which begins anew when it is through. A block is shuffled and packed by itself, by seed and by its number in the stream
alone, so a step's batch follows from data, seed and step here too, and no more than a few blocks are ever in memory.
How many rows of the stream each block became is noted down beside the token cache: a run that goes on skips the blocks
before its step unread by the tokenizer. Without that note it makes them again, to the same end.
"""

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, count, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.config import DataSection
from jaxtune.data.cache import file_state, home_of, key_of
from jaxtune.data.dataset import Dataset
from jaxtune.data.encode import Lengths, chunked, encode_chunk, nothing_left, refuse_bad, refuse_long
from jaxtune.data.examples import Examples, Many, Pair, join
from jaxtune.data.formats import Row, Rows, stream_rows
from jaxtune.data.mixing import Interleaving
from jaxtune.data.packing import Epoch, plan_epoch
from jaxtune.data.records import BadRows
from jaxtune.data.template import ChatTemplate, open_template
from jaxtune.data.tokenise import Tokenising, template_notes
from jaxtune.data_section import TEXTS, MixedSource, SourceSection
from jaxtune.errors import DataError

Named = tuple[SourceSection, str]  # a source with its files, and the setting that names them
KEPT = 2  # blocks in memory: a batch may have rows of two
EDGE = 1 << 20  # bytes at either end of a file that its fingerprint is taken of
PLACES = 1024  # of the stream, whose sources are asked for at once


@dataclass(frozen=True)
class Block(Examples):
    """The examples out of the rows of a block."""

    owners: np.ndarray  # int64 [examples], the number of the source of each


class Reader:
    """The blocks of a stream, counted through all epochs."""

    def __init__(
        self,
        sources: list[Named],
        weights: list[float],
        section: DataSection,
        tokenizer: Any,
        template: ChatTemplate | None,
        virtual: int,
    ):
        """weights: of the sources; with none, they come one after another."""
        self._sources, self._section, self._tokenizer = sources, section, tokenizer
        self._mixing = Interleaving(weights) if weights else None
        self._template, self._virtual, self._size = template, virtual, section.shuffle_buffer
        self.per_epoch: int | None = None  # blocks; None: no epoch has ended yet, as none does with weights
        self._seen, self.lengths = Rows(), Lengths()  # of all rows that were read; of the first block
        self.notes: list[str] = []  # surprises that the template holds
        self._next = 0
        self._rows = self._epoch()
        self._ahead = list(islice(self._rows, self._size))
        # What was seen of the first block; the reading goes on counting.
        self.seen = replace(self._seen, unused=Counter(self._seen.unused))

    def block(self, number: int) -> Block:
        """Blocks before it need not have been asked for.

        Raises:
            DataError: a row is wrong.
        """
        if number != self._next:
            self._seek(number)
        rows = self._take()
        examples, lengths = self._encoded(rows)
        if number == 0:
            self.lengths = lengths
            self.notes = template_notes(self._template, self._section, self._tokenizer, (row for _, row in rows))
        return examples

    def nothing_left(self) -> str:
        """Why the first block is empty, and what to do."""
        rows, why = self.lengths.rows, nothing_left(self.lengths, self._section, self._virtual)
        if rows < self._size:
            return f"no supervised token in {rows} rows: {why}"
        return f"no supervised token in the first {rows} rows: {why}. A larger data.shuffle_buffer looks at more"

    def _take(self) -> list[tuple[int, Row]]:
        """The rows of the next block, each with the number of its source."""
        rows, self._ahead = self._ahead, list(islice(self._rows, self._size))
        self._next += 1
        if not self._ahead:
            self.per_epoch = self.per_epoch or self._next
            self._begin(self._next)
        return rows

    def _seek(self, number: int) -> None:
        """Come to a block without tokenising those before it."""
        if self.per_epoch is None and number < self._next:
            self._begin(0)
        if self.per_epoch is not None:
            self._begin(number - number % self.per_epoch)
        while self._next < number:
            self._take()

    def _begin(self, number: int) -> None:
        """An epoch, whose first block has this number."""
        self._next, self._rows = number, self._epoch()
        self._ahead = list(islice(self._rows, self._size))

    def _epoch(self) -> Iterator[tuple[int, Row]]:
        """Rows with the numbers of their sources."""
        if self._mixing is None:
            for number in range(len(self._sources)):
                yield from ((number, row) for row in self._read(number))
            return
        endless = [self._again_and_again(number) for number in range(len(self._sources))]
        # All are opened now: what is wrong with a rare one is not to come after hours.
        sources = [chain([next(rows)], rows) for rows in endless]
        for start in count(0, PLACES):
            for number in self._mixing.places(start, start + PLACES).tolist():
                yield number, next(sources[number])

    def _read(self, number: int) -> Iterator[Row]:
        source, key = self._sources[number]
        return stream_rows(source, self._seen, key, self._size)

    def _again_and_again(self, number: int) -> Iterator[Row]:
        while True:
            none = True
            for row in self._read(number):
                none = False
                yield row
            if none:
                raise DataError(f"{self._sources[number][1]}: no row to learn from, in a source that has a weight")

    def _encoded(self, rows: list[tuple[int, Row]]) -> tuple[Block, Lengths]:
        parts: list[Pair] = []
        owners: list[int] = []
        counts = Lengths()
        if self._section.shuffle:  # then their order is nothing to keep, and those of one source are encoded together
            rows = sorted(rows, key=lambda pair: pair[0])
        for number, group in groupby(rows, key=lambda pair: pair[0]):
            template = None if self._sources[number][0].format == "text" else self._template
            for chunk in chunked(row for _, row in group):
                found, lengths = encode_chunk(chunk, self._section, self._tokenizer, template, self._virtual)
                parts += [found.read(index) for index in range(len(found))]
                owners += [number] * len(found)
                refuse_bad(lengths, self._sources[number][0])
                counts.add(lengths)
        refuse_long(counts, self._section, self._virtual)
        BadRows(counts.bad, [*counts.bad_first]).check(counts.rows, self._sources[0][1])
        every = join(parts)
        return Block(every.tokens, every.supervised, every.starts, np.array(owners, np.int64)), counts


class Index:
    """How many rows of the stream each block became, kept in a file."""

    def __init__(self, path: Path):
        self.path, self.ends = path, [0]
        self.per_epoch: int | None = None
        found: dict[int, int] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with suppress(ValueError, KeyError):  # torn by a kill
                told = json.loads(line)
                found[told["block"]] = told["rows"]
                self.per_epoch = told.get("per_epoch", self.per_epoch)
        while (rows := found.get(len(self.ends) - 1)) is not None:
            self.ends.append(self.ends[-1] + rows)

    def add(self, rows: int, per_epoch: int | None) -> None:
        """The next block."""
        told = {"block": len(self.ends) - 1, "rows": rows} | ({"per_epoch": per_epoch} if per_epoch else {})
        self.ends.append(self.ends[-1] + rows)
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:  # it is a help, and no more
            file.write(json.dumps(told) + "\n")

    def check(self, block: int, rows: int) -> None:
        """Raise DataError where a block that is known did not become so many rows of the stream."""
        known = self.ends[block + 1] - self.ends[block]
        if known != rows:
            raise DataError(
                f"data.streaming: block {block} became {rows} rows of the stream, but {known} when it was first read: "
                f"a data file changed since. Put it back, or remove {self.path} and begin a new run"
            )

    def find(self, row: int) -> int:
        """The block of a row of the stream; of one that is not known yet, the first block that is not."""
        return bisect_right(self.ends, row) - 1


class Stream(Dataset):
    """Batches 1..steps of data that is read on the way. `examples` and `rows` are those of the first block."""

    def __init__(self, reader: Reader, names: list[str], identity: str, index: str, home: Path, **order: Any):
        """names: of several sources. identity: of the files and of what is made of their rows, but for rows that
        nothing is made of. index: of what decides which rows those are, too, and of when the files changed. home: where
        notes are kept. order: as of Dataset.

        Raises:
            DataError: nothing is left of the first block.
        """
        self._reader, self._names, self._identity = reader, names, identity
        self._blocks: dict[int, tuple[Block, Epoch]] = {}
        first = reader.block(0)
        if not len(first):
            raise DataError(f"data.streaming: {reader.nothing_left()}")
        super().__init__(first, **order)
        self._index = Index(home / f"{self._hash(index)}.jsonl")
        reader.per_epoch = reader.per_epoch or self._index.per_epoch
        self._keep(0, first)
        self.first_block = reader.seen, reader.lengths
        self.notes = reader.notes

    @cached_property
    def fingerprint(self) -> str:
        return self._hash(self._identity)

    @property
    def one_each(self) -> bool:
        """Known before all examples are read."""
        return not self.packing

    def _hash(self, data: str) -> str:
        settings = {**self._order, "time": self.shape[-1], "batch_size": self.batch_size, "data": data}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def _row(self, index: int) -> tuple[Many, np.ndarray]:
        with self._lock:
            number = self._index.find(index)
            while number == len(self._index.ends) - 1:
                self._block(number)
                number = self._index.find(index)
            examples, plan = self._block(number)
            return examples, plan.row(index - self._index.ends[number])

    def _of_sources(self, taken: list[tuple[Many, np.ndarray]]) -> dict[str, int]:
        if not self._names:
            return {}
        owners = [block.owners[members] for block, members in taken if isinstance(block, Block)]
        found = np.bincount(np.concatenate([np.zeros(0, np.int64), *owners]), minlength=len(self._names))
        return dict(zip(self._names, found.tolist(), strict=True))

    def _block(self, number: int) -> tuple[Block, Epoch]:
        if number not in self._blocks:
            self._keep(number, self._reader.block(number))
        return self._blocks[number]

    def _keep(self, number: int, examples: Block) -> None:
        lengths: np.ndarray = examples.lengths + len(self.virtual)
        empty = Epoch(np.zeros(0, np.int64), np.zeros(1, np.int64))
        plan = plan_epoch(lengths, self.shape[-1], epoch=number, **self._order) if len(lengths) else empty
        if len(self._blocks) == KEPT:
            del self._blocks[min(self._blocks)]
        self._blocks[number] = examples, plan
        if number == len(self._index.ends) - 1:
            self._index.add(len(plan), self._reader.per_epoch)
        else:
            self._index.check(number, len(plan))


def open_stream(sources: list[Named], names: list[str], section: DataSection, tokenizer: Any, **order: Any) -> Stream:
    """The stream of some sources' files. names: of several. order: as of Dataset.

    Raises:
        DataError: a file, a row or the template is wrong, or a source chooses among all of its rows.
    """
    for source, key in sources:
        if source.num_samples is not None:
            raise DataError(f"{key}: num_samples chooses among all rows, which data.streaming does not have")
    talks = any(source.format not in TEXTS for source, _ in sources)
    template = open_template(tokenizer, section.template) if talks else None  # to be there for as long as this process
    virtual = len(order["virtual"])
    tasks = [Tokenising(source, key, section, tokenizer, template, virtual) for source, key in sources]
    digests = [[_edges(path) for path in task.source.paths] for task in tasks]
    weights = [source.weight for source, _ in sources if isinstance(source, MixedSource) and source.weight is not None]

    def identity(without: set[str]) -> str:
        keys = [key_of(task, files, without) for task, files in zip(tasks, digests, strict=True)]
        return json.dumps([keys, weights] if weights else keys)

    reader = Reader(sources, weights, section, tokenizer, template, virtual)
    # Of a run that met no such row, both options have decided nothing; drift.py says which changes that allows.
    changed = [[file_state(path)[1] for path in task.source.paths] for task in tasks]  # in its middle, a file may be
    told = identity({"on_bad_line", "too_long"}), f"{identity({'on_bad_line'})} {changed}"
    return Stream(reader, names, *told, home_of(section.cache), **order)


def _edges(path: str) -> str:
    """SHA-256 of a file's size and of its two ends: the whole may be too large to be read before the first step."""
    size, _ = file_state(path)
    digest = hashlib.sha256(f"{size} ".encode())
    try:
        with open(path, "rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(size - EDGE, 0))
            digest.update(file.read(EDGE))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()
