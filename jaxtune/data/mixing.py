"""Several sources in one stream: which source each place belongs to, and which of its examples stands there.

The places are given out so that after any number of them each source has had its exact share, rounded up or down.
The j-th example of a source with share s may come from place floor((j - 1) / s) on and must have come by place
ceil(j / s), counted from 0 and 1; of those that may come, the one that must come first does. Taking the largest
deficit instead would be simpler, but with many sources falls behind by more than one. (The schedule is that of
Steiner and Yeomans, "Level schedules for mixed-model, just-in-time processes", 1993.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from jaxtune.data.packing import shuffled


class Interleaving:
    """Which source each place of an endless stream belongs to. With weights such as 0.7 and 0.3 it soon repeats."""

    def __init__(self, weights: Sequence[float]):
        shares = [Fraction(str(weight)) for weight in weights]
        self.shares = [share / sum(shares) for share in shares]
        self._period = math.lcm(*(share.denominator for share in self.shares))
        self._each = [int(share * self._period) for share in self.shares]  # of a period's places
        self._counts = [0] * len(shares)
        self._known: np.ndarray = np.zeros(0, np.int16)  # the places so far, at most a period

    def places(self, start: int, stop: int) -> np.ndarray:
        """The sources of the places from `start` up to `stop`: int16."""
        self._extend(min(stop, self._period))
        if stop <= self._period:  # which may be a larger number than an int64 holds
            return self._known[start:stop]
        return self._known[np.arange(start, stop) % self._period]

    def before(self, place: int) -> np.ndarray:
        """How many of the places before this one each source has: int64 [sources]."""
        whole, rest = divmod(place, self._period)
        self._extend(rest)
        periods = np.array([whole * each for each in self._each])
        return periods + np.bincount(self._known[:rest], minlength=len(self._each))

    def _extend(self, stop: int) -> None:
        known = len(self._known)
        if stop > known:  # twice as many at least, for all that are known are copied
            stop = min(max(stop, 2 * known), self._period)
            more = [self._next(place) for place in range(known, stop)]
            self._known = np.concatenate([self._known, np.array(more, np.int16)])

    def _next(self, place: int) -> int:
        best, first_end = 0, -1
        for source, each in enumerate(self._each):
            done = self._counts[source]
            if done * self._period < (place + 1) * each:  # it may come
                end = -(-(done + 1) * self._period // each)
                if first_end < 0 or end < first_end:
                    best, first_end = source, end
        self._counts[best] += 1
        return best


@dataclass(frozen=True)
class Sources:
    """Of which sources the examples of a data set are, one source after another."""

    names: tuple[str, ...]
    counts: tuple[int, ...]  # examples of each
    weights: tuple[float, ...] | None = None  # None: every example comes once an epoch

    @cached_property
    def ends(self) -> np.ndarray:
        """Examples up to and with each source."""
        return np.cumsum(self.counts)

    @cached_property
    def _interleaving(self) -> Interleaving:
        assert self.weights is not None
        return Interleaving(self.weights)

    @property
    def shares(self) -> list[float]:
        """Of what is trained on."""
        if self.weights is None:
            return [count / sum(self.counts) for count in self.counts]
        return [float(share) for share in self._interleaving.shares]

    def count(self, examples: np.ndarray) -> dict[str, int]:
        """How many of some examples are of each source."""
        found = np.bincount(np.searchsorted(self.ends, examples, side="right"), minlength=len(self.names))
        return dict(zip(self.names, found.tolist(), strict=True))

    def order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray | None:
        """The examples of an epoch of the stream, as many as all sources have together: int64 [examples].

        Each source goes through epochs of its own, in an order that seed, source and that epoch decide, or in its
        files'. None: there are no weights.
        """
        if self.weights is None:
            return None
        total = sum(self.counts)
        where, before = (ask(epoch * total) for ask in (self._from, self._interleaving.before))
        order: np.ndarray = np.empty(total, np.int64)
        for source, (end, count) in enumerate(zip(self.ends, self.counts, strict=True)):
            mine = np.flatnonzero(where == source)
            order[mine] = end - count + _stretch(source, count, int(before[source]), len(mine), seed, shuffle)
        return order

    def _from(self, place: int) -> np.ndarray:
        return self._interleaving.places(place, place + sum(self.counts))


def _stretch(source: int, count: int, start: int, length: int, seed: int, shuffle: bool) -> np.ndarray:
    """The examples from the `start`-th on that a source gives, in all of its epochs: int64 [length]."""
    first, last = start // count, -(-(start + length) // count)
    epochs = [shuffled(count, "source", seed, source, n) if shuffle else np.arange(count) for n in range(first, last)]
    every = np.concatenate([np.zeros(0, np.int64), *epochs])
    return every[start - first * count :][:length]
