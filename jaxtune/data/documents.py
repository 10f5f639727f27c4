"""Pre-tokenised documents as examples: pointers into memory-mapped files, of which no token is copied before its row
is made. The files are read by megatron.py."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from jaxtune.config import DataSection
from jaxtune.data.encode import Lengths, check
from jaxtune.data.examples import Many, Pair
from jaxtune.data.megatron import DTYPE_AT, IndexedDataset, open_dataset
from jaxtune.data.pieces import split
from jaxtune.errors import DataError

_BLOCK = 1 << 24  # tokens that are looked at together
_LEAST = 2  # tokens of a document: the first is never learnt


@dataclass(frozen=True)
class Documents(Many):
    """Stretches of tokens in files, each an example of which all but the first token is supervised."""

    files: tuple[np.ndarray, ...]  # integers of any type, [tokens of the file]
    starts: np.ndarray  # int64 [examples], the first token, counted through all files
    lengths: np.ndarray  # int64 [examples]

    @cached_property
    def _bases(self) -> list[int]:
        return _bases(self.files)

    @cached_property
    def num_supervised(self) -> int:
        return int(self.lengths.sum()) - len(self)

    def read(self, index: int) -> Pair:
        """One example, its tokens a view of the file."""
        start, length = int(self.starts[index]), int(self.lengths[index])
        number = bisect_right(self._bases, start) - 1
        start -= self._bases[number]
        return self.files[number][start : start + length], np.arange(length) > 0

    def at(self, place: int, indices: np.ndarray) -> Pair:
        starts = self.starts[indices] + place
        tokens: np.ndarray = np.empty(len(indices), np.int32)
        for file, (base, end) in zip(self.files, pairwise(self._bases)):
            own = (base <= starts) & (starts < end)
            tokens[own] = file[starts[own] - base]
        return tokens, np.full(len(indices), place > 0)

    def take(self, indices: np.ndarray) -> "Documents":
        return Documents(self.files, self.starts[indices], self.lengths[indices])

    def add_to(self, digest: Any) -> None:
        """Hash the files as they are, and where in them the examples lie."""
        for file in self.files:
            digest.update(f"{file.dtype.str} {len(file)} ".encode())
            digest.update(file)
        for pointers in (self.starts, self.lengths):
            digest.update(pointers.astype("<i8", copy=False).tobytes())


def _bases(files: Sequence[np.ndarray]) -> list[int]:
    """The number of tokens before each file, and in all."""
    return [0, *np.cumsum([len(file) for file in files]).tolist()]


def read_documents(
    paths: Sequence[str], section: DataSection, virtual: int, vocab_size: int, key: str
) -> tuple[Documents, Lengths]:
    """The documents of Megatron's data sets, at most section.max_length tokens each, less the `virtual` ones.

    paths: prefixes, as the setting `key` lists them. vocab_size: no token is as large.

    Raises:
        DataError: a file is wrong, a token is none of the vocabulary, a document is too long under too_long: error,
            or nothing is left to learn from.
    """
    if not paths:
        raise DataError(f"{key}: an empty list; give the prefix of at least one data set")
    sets = [open_dataset(path) for path in paths]
    for dataset in sets:
        _check_tokens(dataset, vocab_size)
    files = tuple(dataset.tokens for dataset in sets)
    starts = np.concatenate([base + dataset.starts[:-1] for base, dataset in zip(_bases(files), sets)])
    lengths: np.ndarray = np.concatenate([np.diff(dataset.starts) for dataset in sets])
    counts = Lengths(rows=len(lengths), dropped_silent=int(np.count_nonzero(lengths < _LEAST)))
    if section.too_long == "error":
        _count_long(sets, section.max_length - virtual, counts)
    kept = lengths >= _LEAST
    documents = _fit(Documents(files, starts[kept], lengths[kept]), section, section.max_length - virtual, counts)
    check(counts, section, virtual)
    return documents, counts


def _fit(documents: Documents, section: DataSection, room: int, counts: Lengths) -> Documents:
    """What data.too_long makes of the documents, at most `room` tokens each; counted."""
    files, starts, lengths = documents.files, documents.starts, documents.lengths
    long = lengths > room
    if section.too_long == "split":
        counts.split = int(np.count_nonzero(long))
        pieces = split(lengths, room)
        return Documents(files, starts[pieces.documents] + pieces.offsets, pieces.lengths)
    if section.too_long == "truncate":
        counts.truncated = int(np.count_nonzero(long))
        return Documents(files, starts, np.minimum(lengths, room))
    counts.dropped_long = int(np.count_nonzero(long))
    return documents.take(np.flatnonzero(~long))


def _count_long(sets: list[IndexedDataset], room: int, counts: Lengths) -> None:
    """Take down which documents do not fit."""
    for dataset in sets:
        lengths: np.ndarray = np.diff(dataset.starts)
        for number in np.flatnonzero(lengths > room).tolist():
            counts.add_long(int(lengths[number]), f"{dataset.prefix}: document {number}")


def _check_tokens(dataset: IndexedDataset, vocab_size: int) -> None:
    """Every token is one of the vocabulary; a type that holds no others is not looked through."""
    tokens = dataset.tokens
    if tokens.dtype.kind not in "iu":
        raise DataError(f"{dataset.prefix}.idx: byte {DTYPE_AT}: {tokens.dtype.name} numbers, which are no tokens")
    limits = np.iinfo(tokens.dtype)
    if limits.min == 0 and limits.max < vocab_size:
        return
    for at in range(0, len(tokens), _BLOCK):
        block = tokens[at : at + _BLOCK]
        if block.min() < 0 or block.max() >= vocab_size:
            odd = int(np.flatnonzero((block < 0) | (block >= vocab_size))[0])
            raise DataError(
                f"{dataset.prefix}.bin: byte {(at + odd) * tokens.itemsize}: token {block[odd]}; the model has tokens "
                f"0 to {vocab_size - 1}; the data was made with another tokenizer"
            )
