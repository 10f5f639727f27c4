"""Conversations as tokens: flat arrays in memory or mapped from files, and choices of them that copy nothing."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

BLOCK = 1 << 20  # tokens that are looked at together where all are looked at

Pair = tuple[np.ndarray, np.ndarray]  # tokens, and which of them are supervised


class Many(ABC):
    """What all kinds of examples can do. The first token of each is never supervised: nothing comes before it."""

    lengths: np.ndarray  # int64 [examples]

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def read(self, index: int) -> Pair:
        """One example."""

    @abstractmethod
    def at(self, place: int, indices: np.ndarray) -> Pair:
        """Token number `place` of each of these examples, all of which have so many."""

    @abstractmethod
    def take(self, indices: np.ndarray) -> "Many":
        """Only these examples, in this order."""

    def between(self, first: int, last: int) -> Iterator[Pair]:
        """The tokens of examples `first` up to `last`, in pieces."""
        return (self.read(index) for index in range(first, last))

    def runs(self) -> Iterator[Pair]:
        """All tokens in order, in pieces."""
        return self.between(0, len(self))

    def add_to(self, digest: Any) -> None:
        """Hash all that the examples are made of, the same for every way in which they may be kept."""
        starts = np.concatenate(([0], np.cumsum(self.lengths)))
        digest.update(starts.astype("<i8", copy=False).tobytes())
        for tokens, _ in self.runs():
            digest.update(tokens.astype("<i4", copy=False).tobytes())
        for bits in _packed(mask for _, mask in self.runs()):
            digest.update(bits)

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def num_supervised(self) -> int:
        return sum(int(np.count_nonzero(mask)) for _, mask in self.runs())

    @cached_property
    def common_start(self) -> int:
        """How many tokens all examples begin with, none of which predicts a supervised one."""
        every = np.arange(len(self))
        most = int(self.lengths.min()) - 1 if len(self) else 0
        columns = (self.at(place, every) for place in range(most + 1))
        for place, ((tokens, _), (_, learnt)) in enumerate(pairwise(columns)):
            if (tokens != tokens[0]).any() or learnt.any():
                return place
        return max(most, 0)

    @cached_property
    def largest_token(self) -> int:
        return max(int(tokens.max(initial=0)) for tokens, _ in self.runs())


@dataclass(frozen=True)
class Examples(Many):
    """Examples end to end."""

    tokens: np.ndarray  # int32, or of fewer bits without a sign, [all tokens]
    supervised: np.ndarray  # bool [all tokens]
    starts: np.ndarray  # int64 [examples + 1]

    @cached_property
    def lengths(self) -> np.ndarray:  # type: ignore[override]
        return np.diff(self.starts)

    def read(self, index: int) -> Pair:
        part = slice(self.starts[index], self.starts[index + 1])
        return self.tokens[part].astype(np.int32, copy=False), self.supervised[part]  # -100 has no place in uint16

    def at(self, place: int, indices: np.ndarray) -> Pair:
        where = self.starts[indices] + place
        return self.tokens[where], self.supervised[where]

    def between(self, first: int, last: int) -> Iterator[Pair]:
        """The tokens of examples `first` up to `last`, in pieces of at most BLOCK."""
        end = int(self.starts[last])
        for start in range(int(self.starts[first]), end, BLOCK):
            part = slice(start, min(start + BLOCK, end))
            yield self.tokens[part], self.supervised[part]

    def take(self, indices: np.ndarray) -> "Examples":
        """A copy of these examples, in this order."""
        return join([self.read(i) for i in indices])


@dataclass(frozen=True)
class Chosen(Many):
    """Examples out of several parts, which stay where they are: nothing is copied but one number for each."""

    parts: Sequence[Many]
    indices: np.ndarray  # int64 [examples], counted through all parts

    @cached_property
    def ends(self) -> list[int]:
        """Examples up to and with each part."""
        return np.cumsum([len(part) for part in self.parts]).tolist()

    @cached_property
    def lengths(self) -> np.ndarray:  # type: ignore[override]
        return np.concatenate([part.lengths for part in self.parts])[self.indices]

    def _place(self, index: int) -> tuple[Many, int]:
        """The part of an example, counted through all of them, and its number there."""
        number = bisect_right(self.ends, index)
        return self.parts[number], index - (self.ends[number - 1] if number else 0)

    def read(self, index: int) -> Pair:
        part, own = self._place(int(self.indices[index]))
        return part.read(own)

    def at(self, place: int, indices: np.ndarray) -> Pair:
        chosen = self.indices[indices]
        tokens: np.ndarray = np.empty(len(chosen), np.int32)
        supervised: np.ndarray = np.empty(len(chosen), bool)
        for part, first, end in zip(self.parts, [0, *self.ends], self.ends):
            own = (first <= chosen) & (chosen < end)
            tokens[own], supervised[own] = part.at(place, chosen[own] - first)
        return tokens, supervised

    def runs(self) -> Iterator[Pair]:
        """Neighbours that are neighbours in their part too come together."""
        parts = np.searchsorted(self.ends, self.indices, side="right")
        breaks: np.ndarray = np.flatnonzero((np.diff(self.indices) != 1) | (np.diff(parts) != 0)) + 1
        edges = [0, *breaks.tolist(), len(self.indices)]
        for first, last in pairwise(edges):
            if last > first:
                part, own = self._place(int(self.indices[first]))
                yield from part.between(own, own + last - first)

    def take(self, indices: np.ndarray) -> "Chosen":
        return Chosen(self.parts, self.indices[indices])

    @cached_property
    def _copy(self) -> Examples:
        return join([self.read(index) for index in range(len(self))])

    @property
    def tokens(self) -> np.ndarray:
        """As those of Examples, copied: for few."""
        return self._copy.tokens

    @property
    def supervised(self) -> np.ndarray:
        return self._copy.supervised

    @property
    def starts(self) -> np.ndarray:
        return self._copy.starts


def join(parts: list[Pair]) -> Examples:
    """Examples out of the (tokens, supervised) of each."""
    starts = np.concatenate(([0], np.cumsum([len(tokens) for tokens, _ in parts], dtype=np.int64)))
    tokens = np.concatenate([np.zeros(0, np.int32), *(tokens.astype(np.int32, copy=False) for tokens, _ in parts)])
    return Examples(tokens, np.concatenate([np.zeros(0, bool), *(mask for _, mask in parts)]), starts.astype(np.int64))


def concatenate(parts: Sequence[Many]) -> Many:
    """The examples of all parts, one part after another."""
    if len(parts) == 1:
        return parts[0]
    return Chosen(parts, np.arange(sum(len(part) for part in parts)))


def _packed(masks: Iterator[np.ndarray]) -> Iterator[bytes]:
    """The bytes of np.packbits of all masks, joined."""
    rest: np.ndarray = np.zeros(0, bool)
    for mask in masks:
        bits = np.concatenate([rest, mask])
        whole = len(bits) // 8 * 8
        yield np.packbits(bits[:whole]).tobytes()
        rest = bits[whole:]
    yield np.packbits(rest).tobytes()
