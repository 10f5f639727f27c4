"""Which examples stand together in which row, in every epoch. Lengths and a seed decide it, and nothing else does.

A row holds one example or, packed, several; none is ever split. Tokens are put into rows by loader.py.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

WINDOW = 4096  # shuffled examples that are packed together: many for a good fill, few for a random company


def shuffled(count: int, *key: int | str) -> np.ndarray:
    """A permutation of range(count) that depends on `key` alone, for ever: int64 [count].

    Not numpy's generators, whose streams may change from version to version: the numbers 0, 1, ... are sorted by
    their SplitMix64 hashes (Steele, Lea and Flood, 2014), from a start that the key's SHA-256 gives.
    """
    start = np.frombuffer(hashlib.sha256(repr(key).encode()).digest()[:8], "<u8")
    x = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


@dataclass(frozen=True)
class Epoch:
    """The rows of one epoch: row r holds the examples order[starts[r]:starts[r + 1]]."""

    order: np.ndarray  # int64 [examples]
    starts: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> np.ndarray:
        """The examples of one row."""
        return self.order[self.starts[index] : self.starts[index + 1]]


def plan_epoch(
    lengths: np.ndarray,
    space: int,
    *,
    seed: int,
    epoch: int,
    packing: bool,
    shuffle: bool,
    order: np.ndarray | None = None,
) -> Epoch:
    """One epoch's rows of at most `space` tokens each.

    lengths: int [examples], none above `space`. Without `shuffle` rows are opened in the order of the examples, and
    every epoch is the same. order: the examples of the epoch, which are mixed already, one after another; without
    it every example stands in exactly one row.
    """
    mixed = order is not None
    if order is None:
        order = shuffled(len(lengths), "examples", seed, epoch) if shuffle else np.arange(len(lengths))
    count = len(order)
    if not packing:
        return Epoch(order, np.arange(count + 1))
    windows = np.array_split(order, max(1, round(count / WINDOW)))
    packed = [_pack(window, lengths, space, longest_first=shuffle) for window in windows]
    if shuffle and mixed:  # a window has every source's share; so has what is trained on up to its end
        packed = [_mixed_up(rows, "rows", seed, epoch, number) for number, rows in enumerate(packed)]
    rows = [row for window in packed for row in window]
    if shuffle and not mixed:
        rows = _mixed_up(rows, "rows", seed, epoch)
    starts = np.concatenate(([0], np.cumsum([len(row) for row in rows], dtype=np.int64)))
    return Epoch(np.fromiter((i for row in rows for i in row), np.int64, count), starts.astype(np.int64))


def _mixed_up(rows: list[list[int]], *key: int | str) -> list[list[int]]:
    """The first rows of a window hold its longest examples; no stretch of training should see only those."""
    return [rows[i] for i in shuffled(len(rows), *key)]


def _pack(window: np.ndarray, lengths: np.ndarray, space: int, longest_first: bool) -> list[list[int]]:
    """Best fit: each example goes where it leaves the least room; taken longest first, few rows have much left.

    Rows are kept by the room that they have left, and the set of rooms as the bits of one integer, so that the
    smallest room that is large enough is one shift and one bit trick away.
    """
    sizes = lengths[window]
    rows: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {}
    rooms = 0
    for at in np.argsort(-sizes, kind="stable") if longest_first else range(len(window)):
        size, example = int(sizes[at]), int(window[at])
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = space, []
            rows.append(row)
        row.append(example)
        left = room - size
        by_room.setdefault(left, []).append(row)
        rooms |= 1 << left
    return rows
