"""Which examples stand together in which row, in every epoch. Lengths and a seed decide it, and nothing else does.

A row holds one example or, packed, several; none is ever split. Tokens are put into rows by loader.py.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
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
    packing: bool | str,
    shuffle: bool,
    order: np.ndarray | None = None,
) -> Epoch:
    """One epoch's rows of at most `space` tokens each.

    lengths: int [examples], none above `space`. Without `shuffle` rows are opened in the order of the examples, and
    every epoch is the same. packing: as data.packing has it. order: the examples of the epoch, which are mixed
    already, one after another; without it every example stands in exactly one row.
    """
    mixed = order is not None
    if order is None:
        order = shuffled(len(lengths), "examples", seed, epoch) if shuffle else np.arange(len(lengths))
    if not packing:
        return Epoch(order, np.arange(len(order) + 1))
    if packing == "in_order":
        return Epoch(order, _close_when_full(lengths[order], space))
    windows = np.array_split(order, max(1, round(len(order) / WINDOW)))
    packed = [_best_fit(window, lengths, space, longest_first=shuffle) for window in windows]
    if shuffle and mixed:  # a window has every source's share; so has what is trained on up to its end
        packed = [_mixed_up(*window, "rows", seed, epoch, number) for number, window in enumerate(packed)]
    order, counts = (np.concatenate(parts) for parts in zip(*packed, strict=True))
    if shuffle and not mixed:
        order, counts = _mixed_up(order, counts, "rows", seed, epoch)
    return Epoch(order, _starts(counts))


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each row starts, and where the last one ends."""
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def _mixed_up(order: np.ndarray, counts: np.ndarray, *key: int | str) -> tuple[np.ndarray, np.ndarray]:
    """Rows in an order that `key` decides, as (examples, examples of each row).

    The first rows of a window hold its longest examples; no stretch of training should see only those.
    """
    rows = shuffled(len(counts), *key)
    starts, counts = _starts(counts)[rows], counts[rows]
    return order[np.repeat(starts - _starts(counts)[:-1], counts) + np.arange(len(order))], counts


def _close_when_full(sizes: np.ndarray, space: int) -> np.ndarray:
    """The rows' starts when each takes what follows until the next does not fit: int64 [rows + 1]."""
    ends, starts = np.cumsum(sizes).tolist(), [0]
    while starts[-1] < len(ends):
        before = ends[starts[-1] - 1] if starts[-1] else 0
        starts.append(bisect_right(ends, before + space, starts[-1]))
    return np.array(starts, np.int64)


def _best_fit(
    window: np.ndarray, lengths: np.ndarray, space: int, longest_first: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Each example goes where it leaves the least room; taken longest first, few rows have much left.

    Rows are kept by the room that they have left, the latest on top, and the set of rooms as the bits of one
    integer, so that the smallest room that is large enough is one shift and one bit trick away. Examples of one size
    that follow one another are put into the rows of one room, or into one row, together.

    Returns the window's examples row by row, and how many are in each row.
    """
    sizes = lengths[window]
    if longest_first:
        by_size = np.argsort(-sizes, kind="stable")
        window, sizes = window[by_size], sizes[by_size]
    row_of: list[int] = []
    by_room: dict[int, list[int]] = {}
    rooms = rows = 0
    for size, count in _repeats(sizes):
        while count:
            enough = rooms >> size
            if enough:
                room = size + (enough & -enough).bit_length() - 1
                stack = by_room[room]
            else:
                room, stack, rows = space, [rows], rows + 1
            times = min(count, room // size)  # after one, what is left of a row is still the smallest room
            taken = [stack.pop()] if times > 1 else [stack.pop() for _ in range(min(count, len(stack)))]
            if enough and not stack:
                rooms ^= 1 << room
            row_of += taken * times
            count -= len(taken) * times
            left = room - size * times
            by_room.setdefault(left, []).extend(taken)
            rooms |= 1 << left
    assigned: np.ndarray = np.array(row_of, np.int64)
    return window[np.argsort(assigned, kind="stable")], np.bincount(assigned, minlength=rows)


def _repeats(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """(a size, how many times it follows itself), in order."""
    edges = np.concatenate(([0], np.flatnonzero(np.diff(sizes)) + 1, [len(sizes)]))
    if len(sizes):
        yield from zip(sizes[edges[:-1]].tolist(), np.diff(edges).tolist(), strict=True)
