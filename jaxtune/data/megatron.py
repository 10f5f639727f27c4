"""Megatron-LM's indexed data sets: tokens in a PREFIX.bin, and where each document lies among them in a PREFIX.idx.

The format is that of megatron/core/datasets/indexed_dataset.py, little-endian and without padding:

    PREFIX.bin     the tokens of all documents, back to back
    PREFIX.idx  0  9 bytes   MMIDIDX and two zeros
                9  uint64    the version, 1
               17  uint8     the type of a token, a code of DTYPES
               18  uint64    N, the number of sequences
               26  uint64    D, the number of documents, plus 1
               34  int32[N]  tokens of each sequence
           34+4N  int64[N]  the byte of the .bin at which each begins
          34+12N  int64[D]  the sequence with which each document begins, and at last N

A sequence is a whole document or, in data split into sentences, one of its sentences. A document may be empty.
What is learnt from the tokens is documents.py's.
"""

import contextlib
import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxtune.errors import DataError, listing
from jaxtune.files import is_at, try_lock

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_KINDS = ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")
DTYPES = {code: np.dtype(kind).newbyteorder("<") for code, kind in enumerate(_KINDS, 1)}
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code, N, D
_VERSION_AT, DTYPE_AT, _DOCUMENTS_AT = 9, 17, 26  # bytes of the .idx


@dataclass(frozen=True)
class IndexedDataset:
    """A pair of files, opened. The arrays are read-only memory maps."""

    prefix: str
    tokens: np.ndarray  # of a type in DTYPES, [all tokens]
    lengths: np.ndarray  # int32 [sequences]
    documents: np.ndarray  # int64 [documents + 1]: the first sequence of each, and the number of sequences

    def __len__(self) -> int:
        return len(self.documents) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        """The tokens of a document, counted from 0."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]

    @cached_property
    def starts(self) -> np.ndarray:
        """The first token of each document, and the number of tokens: int64 [documents + 1]."""
        return _ends(self.lengths)[self.documents]


def open_dataset(path: str) -> IndexedDataset:
    """The data set whose prefix, .bin or .idx is `path`. No token is read.

    Raises:
        DataError: a file is missing or damaged, or the two do not belong together; the message names file and byte.
    """
    prefix = path[:-4] if path.endswith((".bin", ".idx")) else path
    index, tokens = Path(prefix + ".idx"), Path(prefix + ".bin")
    try:
        size = tokens.stat().st_size
        dtype, lengths, pointers, documents = _read_index(index)
        _check_sequences(index, tokens, size, dtype, lengths, pointers)
        _check_documents(index, len(lengths), documents)
        return IndexedDataset(prefix, _mapped(tokens, dtype), lengths, documents)
    except OSError as error:
        needed = f"; a Megatron data set is {index.name} and {tokens.name}, and data.path their path without the ending"
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}{needed}") from None


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """The file as an array; an empty file cannot be mapped."""
    return np.memmap(path, dtype, "r").view(np.ndarray) if path.stat().st_size else np.zeros(0, dtype)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """(type of the tokens, lengths, pointers, documents), as the module's first lines have them."""
    dtype, sequences, bounds = _read_header(path)
    index, at, arrays = _mapped(path, np.dtype("u1")), _HEADER.size, []
    for kind, count in (("<i4", sequences), ("<i8", sequences), ("<i8", bounds)):
        arrays.append(np.frombuffer(index, kind, count, at))
        at += arrays[-1].nbytes
    return (dtype, *arrays)


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """(type of the tokens, N, D), which agree with the file's size."""
    with path.open("rb") as file:
        raw, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    if raw[: len(MAGIC)] != MAGIC:
        raise _fault(path, 0, f"{raw[: len(MAGIC)]!r}; expected {MAGIC!r}: this is no index of a Megatron data set")
    if len(raw) < _HEADER.size:
        raise _fault(path, len(raw), f"the file ends inside its header of {_HEADER.size} bytes; was it cut off?")
    _, version, code, sequences, bounds = _HEADER.unpack(raw)
    if version != VERSION:
        raise _fault(path, _VERSION_AT, f"version {version}; allowed: {VERSION}")
    if code not in DTYPES:
        names = listing((f"{code} {dtype.name}" for code, dtype in DTYPES.items()), len(DTYPES))
        raise _fault(path, DTYPE_AT, f"type of tokens {code}; allowed: {names}")
    if bounds < 1:
        raise _fault(path, _DOCUMENTS_AT, "no bounds of documents; expected one more than there are documents")
    _check_size(path, size, sequences, bounds)
    return DTYPES[code], sequences, bounds


def _check_size(path: Path, size: int, sequences: int, bounds: int) -> None:
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    what = f"{sequences} sequences and {bounds} bounds of documents need {expected} bytes"
    if size < expected:
        raise _fault(path, size, f"the file ends, but {what}; was it cut off while it was written?")
    if size == expected + sequences and sequences:
        raise _fault(path, expected, "modes of sequences: the data is multimodal; only text can be learnt from")
    if size > expected:
        raise _fault(path, expected, f"{size - expected} bytes too many: {what}; the numbers or the file are damaged")


def _check_sequences(
    index: Path, tokens: Path, size: int, dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray
) -> None:
    """They lie back to back, and fill the .bin of `size` bytes."""
    negative = np.flatnonzero(lengths < 0)
    if len(negative):
        first = int(negative[0])
        raise _fault(index, _HEADER.size + 4 * first, f"sequence {first} has {lengths[first]} tokens")
    ends: np.ndarray = _ends(lengths) * dtype.itemsize
    wrong = np.flatnonzero(pointers != ends[:-1])
    if len(wrong):
        first, at = int(wrong[0]), _HEADER.size + lengths.nbytes
        found = f"sequence {first} begins at byte {pointers[first]} of {tokens.name}, which has {size} bytes"
        raise _fault(index, at + 8 * first, f"{found}; expected {ends[first]}, where the one before it ends")
    if ends[-1] > size:
        first = int(np.searchsorted(ends, size, "right")) - 1
        found = f"sequence {first} ends at byte {ends[first + 1]} of {tokens.name}, which has {size} bytes"
        raise _fault(index, _HEADER.size + 4 * first, f"{found}; was that file cut off, or is it another's?")
    if ends[-1] < size:
        left = size - int(ends[-1])
        raise _fault(tokens, int(ends[-1]), f"{left} bytes of no sequence in {index.name}; is that another data set's?")


def _check_documents(path: Path, sequences: int, documents: np.ndarray) -> None:
    """They begin with sequence 0, do not go back, and end with the last sequence."""
    at = _HEADER.size + 12 * sequences
    if documents[0] != 0:
        raise _fault(path, at, f"the first document begins with sequence {documents[0]}; expected 0")
    falling = np.flatnonzero(documents[1:] < documents[:-1])
    if len(falling):
        first = int(falling[0]) + 1
        found = f"document {first} begins with sequence {documents[first]}, the one before it with"
        raise _fault(path, at + 8 * first, f"{found} {documents[first - 1]}; they must not go back")
    if documents[-1] != sequences:
        last = len(documents) - 1
        raise _fault(path, at + 8 * last, f"the documents end with sequence {documents[-1]} of {sequences}")


def _fault(path: Path, byte: int, what: str) -> DataError:
    return DataError(f"{path}: byte {byte}: {what}")


def _ends(lengths: np.ndarray) -> np.ndarray:
    """0, and the sum of the lengths up to each: int64 [sequences + 1]."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64)


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The type that Megatron takes for the tokens of a vocabulary."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


class DatasetWriter:
    """Writes a data set, document by document; in a `with` block, so that what is not finished leaves no file.

    The files have temporary names until `finalize`; the .idx gets its name last, so that the two are complete where
    it is there. Until then no other process gets them; the lock of one that was killed is free.
    """

    def __init__(self, prefix: str, dtype: np.dtype = DTYPES[4]):
        """dtype: of the tokens, one of DTYPES.

        Raises:
            DataError: another process writes this data set.
        """
        self.prefix = prefix
        self._code = next(code for code, known in DTYPES.items() if known == dtype)
        self._lengths, self._documents = array("i"), array("q", [0])
        self._finished = False
        self._lock = self._take()  # before the file is opened, which empties it
        self._file = open(self._temporary("bin"), "wb")  # noqa: SIM115 - closed by finalize or __exit__

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self._code]

    def add_document(self, tokens: Sequence[int] | np.ndarray, lengths: Sequence[int] | None = None) -> None:
        """Write a document's tokens. lengths: of its sequences; None: it is one, or none if there is no token.

        Raises:
            DataError: a token does not fit the type.
            ValueError: the lengths are not those of the tokens.
        """
        given = np.asarray(tokens)
        written = given.astype(self.dtype)
        if not np.array_equal(written, given):
            odd = given[written != given][0]
            raise DataError(f"{self.prefix}: token {odd} does not fit {self.dtype.name}, the type of the data set")
        if lengths is None:
            lengths = [len(given)] if len(given) else []
        if sum(lengths) != len(given) or any(length < 0 for length in lengths):
            raise ValueError(f"sequences of {lengths} tokens do not make a document of {len(given)}")
        self._file.write(written.tobytes())
        self._lengths.extend(lengths)
        self._documents.append(len(self._lengths))

    def add_dataset(self, other: IndexedDataset) -> None:
        """Write all documents of another data set.

        Raises:
            DataError: its tokens are of another type.
        """
        if other.tokens.dtype != self.dtype:
            raise DataError(f"{other.prefix}: tokens of type {other.tokens.dtype.name}; expected {self.dtype.name}")
        self._file.write(other.tokens.data)
        self._documents.frombytes((other.documents[1:] + len(self._lengths)).astype("=i8").tobytes())
        self._lengths.frombytes(other.lengths.astype("=i4").tobytes())

    def finalize(self) -> None:
        """Write the index, and give both files their names. Files of the same names are replaced."""
        lengths, documents = np.array(self._lengths, "<i4"), np.array(self._documents, "<i8")
        pointers: np.ndarray = (_ends(lengths)[:-1] * self.dtype.itemsize).astype("<i8")
        _close(self._file)
        with open(self._temporary("idx"), "wb") as index:
            index.write(_HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(documents)))
            for part in (lengths, pointers, documents):
                index.write(part.tobytes())
            _close(index)
        Path(self.prefix + ".idx").unlink(missing_ok=True)  # an old one would not fit the new .bin
        for ending in ("bin", "idx"):
            os.replace(self._temporary(ending), f"{self.prefix}.{ending}")
        self._finished = True

    def _take(self) -> int:
        """The handle that has the lock."""
        path = self._temporary("bin")
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if try_lock(handle) is False or not is_at(handle, path):
            os.close(handle)
            raise DataError(
                f"{self.prefix}.bin: another process writes it; wait for it or stop it, or give another prefix"
            )
        return handle

    def _temporary(self, ending: str) -> Path:
        return Path(f"{self.prefix}.{ending}.tmp")

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # a full disk does not take the last tokens, which are given up here anyway
            self._file.close()
        if not self._finished:  # else they are the next writer's
            for ending in ("bin", "idx"):
                self._temporary(ending).unlink(missing_ok=True)
        os.close(self._lock)


def _close(file) -> None:
    """With all that was written on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
