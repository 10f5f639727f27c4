"""Rows out of tables: CSV and TSV, which hold text alone, and Parquet and Arrow, whose values are those of JSON.

All are read as a stream. pyarrow is imported when a file needs it.
"""

import csv
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from types import ModuleType
from typing import Any, BinaryIO

from jaxtune.data.records import MAX_LINE, Bad, Record, decode, first_line, numbered
from jaxtune.errors import DataError, listing

_BATCH = 256  # rows that become Python objects at once
_OTHERS = {",": ";\t|", "\t": ",;|"}  # what separates the columns of a file whose name says something else
_IPC_FILE, _FEATHER_1 = b"ARROW1", b"FEA1"  # the first bytes of a file


def read_csv(file: BinaryIO, path: str, bad: Bad) -> Iterator[Record]:
    """Comma separated values under a header, as RFC 4180 has them; blank lines are skipped.

    After a stray quote nobody can tell where the next row begins, so that is always an error; a row of too few or too
    many cells, or with bytes that are no text, is a bad row.
    """
    return _separated(file, path, bad, ",")


def read_tsv(file: BinaryIO, path: str, bad: Bad) -> Iterator[Record]:
    """Tab separated values, otherwise as read_csv."""
    return _separated(file, path, bad, "\t")


def _separated(file: BinaryIO, path: str, bad: Bad, delimiter: str) -> Iterator[Record]:
    rows = _cells(_Lines(file, path), path, delimiter)
    header: list[str] = []
    for line, cells, problem in rows:
        if not header:
            header = _header(path, cells, problem, delimiter)
            continue
        if problem is None and len(cells) != len(header):
            problem = DataError(f"{path}:{line}: {len(cells)} cells; the header has {len(header)} columns")
        if problem is None:
            yield f"{path}:{line}", dict(zip(header, cells))
        else:
            bad(problem)


class _Lines:
    """The lines of a file, as csv takes them. What cannot be decoded is told apart, so that csv can go on."""

    def __init__(self, file: BinaryIO, path: str):
        self._lines, self._path = numbered(file, path), path
        self.number = 0
        self.problem: DataError | None = None

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.number, raw = next(self._lines)
        try:
            return decode(raw, self._path, self.number)
        except DataError as error:
            self.problem = self.problem or error
            return raw.decode("utf-8", "replace")


def _cells(lines: _Lines, path: str, delimiter: str) -> Iterator[tuple[int, list[str], DataError | None]]:
    """(the line that it begins on, cells, what was wrong with its bytes) of each row that is not blank."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line, lines.problem = lines.number + 1, None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "; a quote is never closed: was the file cut off?" if "end of data" in str(error) else ""
            raise DataError(f"{path}:{line}: not valid CSV: {error}{hint}") from None
        if cells:
            yield line, cells, lines.problem


def _header(path: str, cells: list[str], problem: DataError | None, delimiter: str) -> list[str]:
    if problem is not None:
        raise problem
    if len(cells) == 1 and any(sign in cells[0] for sign in _OTHERS[delimiter]):
        raise DataError(
            f"{path}:1: the header is one cell, {cells[0]!r:.60}; columns are separated by commas in a .csv, by tabs "
            "in a .tsv: save it so"
        )
    _refuse_twice(cells, f"{path}:1: the header")
    return cells


def _refuse_twice(names: list[str], what: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{what} has {listing(map(repr, twice))} more than once; each column needs a name")


def read_parquet(path: str, bad: Bad) -> Iterator[Record]:
    """The rows of a Parquet file, a few hundred at a time."""
    with _told(path):
        parquet = pyarrow_for(path, "pyarrow.parquet")
        with parquet.ParquetFile(path, page_checksum_verification=True) as table:
            yield from _rows(table.iter_batches(batch_size=_BATCH), path)


def read_arrow(path: str, bad: Bad) -> Iterator[Record]:
    """The rows of an Arrow IPC file, which a Feather file is too, or of an IPC stream, whatever its name says."""
    with _told(path):
        arrow, ipc = pyarrow_for(path), pyarrow_for(path, "pyarrow.ipc")
        with open(path, "rb") as start:
            magic = start.read(6)
        if magic.startswith(_FEATHER_1):
            raise DataError(f"{path}: Feather of version 1; write it again with a newer version of what made it")
        with arrow.OSFile(path) as file:
            yield from _rows(_whole(ipc.open_file(file)) if magic == _IPC_FILE else ipc.open_stream(file), path)


def _whole(table: Any) -> Iterator[Any]:
    return (table.get_batch(number) for number in range(table.num_record_batches))


def _rows(batches: Iterable[Any], path: str) -> Iterator[Record]:
    """The rows of record batches as Python objects: structs and maps are dicts, lists are lists."""
    numbers = count(1)
    for batch in batches:
        _refuse_twice(batch.schema.names, f"{path}: the table")
        batch.validate(full=True)  # offsets that lead nowhere would be followed; text may be no UTF-8
        for start in range(0, batch.num_rows, _BATCH):
            for row, number in zip(batch.slice(start, _BATCH).to_pylist(maps_as_pydicts="strict"), numbers):
                yield f"{path} (row {number})", row


@contextmanager
def _told(path: str) -> Iterator[None]:
    """What pyarrow finds wrong in a file, as a DataError. What the reader of the rows does is outside of this."""
    try:
        yield
    except (ValueError, KeyError) as error:  # pyarrow's own errors are ValueErrors; a map with a key twice
        raise DataError(f"{path}: damaged, cut off, or not what its name says: {first_line(error)}") from None


def pyarrow_for(path: str, module: str = "pyarrow") -> ModuleType:
    """pyarrow, which `path` cannot be read without, or one of its modules.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{path}: this kind of file needs pyarrow ({error}): pip install pyarrow") from None
