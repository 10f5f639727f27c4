"""From a file of any kind to its records, as a stream. Which files there are is for locate.py, what the rows mean for
formats.py.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxtune.data import tables, text_files
from jaxtune.data.records import Bad, Record, first_line, refuse
from jaxtune.errors import DataError, listing

TEXT: dict[str, Callable[[BinaryIO, str, Bad], Iterator[Record]]] = {
    ".json": text_files.read_array,
    ".jsonl": text_files.read_lines,
    ".csv": tables.read_csv,
    ".tsv": tables.read_tsv,
    ".txt": text_files.read_plain,
}
TABLES: dict[str, Callable[[str, Bad], Iterator[Record]]] = {
    ".parquet": tables.read_parquet,
    ".arrow": tables.read_arrow,
    ".feather": tables.read_arrow,
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")  # of TEXT
ALLOWED = (
    ".json (an array of objects), .jsonl (one a line), .csv, .tsv, .txt (a row a line), each also with "
    f"{listing(COMPRESSED)} behind it; .parquet, .arrow, .feather"
)
# What the datasets library writes beside the rows.
_BESIDE_DATA = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|cache-.*\.arrow")
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError)


def kind_of(path: str) -> tuple[str, str]:
    """(".jsonl", ".gz") of a path: what it is and how it is compressed; an empty string for neither."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in Path(path).suffixes)]
    if last in COMPRESSED and before in TEXT:
        return before, last
    return (last, "") if last in TEXT or last in TABLES else ("", "")


def is_table(path: str) -> bool:
    """Whether a file's columns have types, which all of its rows share."""
    return kind_of(path)[0] in TABLES


def is_data(path: str) -> bool:
    """Whether a file has rows, as far as its name tells."""
    return bool(kind_of(path)[0]) and not _BESIDE_DATA.fullmatch(Path(path).name)


def read_records(path: str, bad: Bad = refuse) -> Iterator[Record]:
    """The records of a file, in order.

    bad: told of each row that is wrong; the usual one raises. What is wrong with the file as a whole is always raised.

    Raises:
        DataError: the file is not what its name says; the message names the first line or row of which that is true.
    """
    known, compression = kind_of(path)
    if not known:
        raise DataError(f"{path}: unknown kind of file; allowed: {ALLOWED}")
    count, last = 0, ""

    def told(error: DataError) -> None:
        nonlocal count
        count += 1
        bad(error)

    try:
        for record in _read(path, known, compression, told):
            count, last = count + 1, record[0]
            yield record
    except (OSError, *_DAMAGED) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: cannot be read: {os.strerror(error.errno)}") from None
        after = f" (the last good row is {last})" if last else ""
        raise DataError(f"{path}: damaged or cut off{after}: {first_line(error)}") from None
    if not count:
        raise DataError(f"{path}: empty: there is no row in it")


def _read(path: str, known: str, compression: str, bad: Bad) -> Iterator[Record]:
    if known in TABLES:
        yield from TABLES[known](path, bad)
    else:
        with _open(path, compression) as file:
            yield from TEXT[known](file, path, bad)


def _open(path: str, compression: str) -> BinaryIO:
    """The bytes of a file as they were before it was compressed."""
    if compression == ".zst":
        arrow = tables.pyarrow_for(path)
        with Path(path).open("rb"):  # whether it can be read at all, in the words of the system
            return io.BufferedReader(arrow.input_stream(path, compression="zstd"))
    openers: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[compression](path, "rb")
