"""Batches of examples, each a pure function of its step.

The stream of a data set is its epochs' rows, one epoch after another; step s trains on rows (s-1)*B up to s*B of it,
B being train.batch_size. So neither devices nor processes nor where a run was interrupted have a say in the order,
and the state of the data is the step. All batches of a run have one shape, [micro_batches, rows, time].

A tuning method may have virtual tokens, ids past the vocabulary: they are put before every example as it is written
into a row, or before the start that examples share, take their room there, and are counted nowhere.

What all examples begin with may be shared: it is written once, at the start of every pack, for all that stand in it.
Their tokens see it and their positions follow it, so that each has the numbers that it would have by itself.
"""

import hashlib
import json
import math
import threading
from bisect import bisect_right
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import grain
import numpy as np

from jaxtune.data.examples import Many
from jaxtune.data.mixing import Sources
from jaxtune.data.packing import Epoch, plan_epoch
from jaxtune.errors import ConfigError
from jaxtune.section import LARGEST
from jaxtune.segments import SHARED

STREAM_VERSION = 1  # to be raised with any change of order or packing, so that an old run is not resumed on a new one
NONE = range(0)  # no virtual tokens
TIME_MULTIPLE = 64  # unpacked rows are padded to one
KEPT = 3  # plans of epochs in memory
WORTH_SHARING = 8  # tokens: of fewer, attention to them costs more than is won
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


@dataclass(frozen=True)
class Batch:
    """What one step trains on. Every array is [micro_batches, rows, time]."""

    tokens: np.ndarray  # int32; 0 where there is padding
    targets: np.ndarray  # int32, the token that follows; 0 where it is not supervised
    mask: np.ndarray  # bool, where the target is supervised
    positions: np.ndarray  # int32, from 0 in each document, or from where the shared start ends
    segments: np.ndarray  # int32, 1, 2, ... for the documents of a row, or PADDING or SHARED (jaxtune/segments.py)
    virtual: int = field(default=0, kw_only=True)  # how many of its tokens are virtual
    spared: int = field(default=0, kw_only=True)  # tokens of its examples that sharing has left out
    sources: dict[str, int] = field(default_factory=dict, kw_only=True)  # of several: the examples of each

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if not item.kw_only}

    def sha256(self) -> str:
        """Of the contents; the same for every split into micro-batches."""
        digest = hashlib.sha256()
        for name, array in self.arrays().items():
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(f"{name} {array.shape[-1]} ".encode() + np.ascontiguousarray(little).tobytes())
        return digest.hexdigest()

    @cached_property
    def num_tokens(self) -> int:
        """Real tokens: neither padding nor virtual ones are counted."""
        return int(np.count_nonzero(self.segments)) - self.virtual

    @cached_property
    def num_supervised(self) -> int:
        return int(np.count_nonzero(self.mask))


class Dataset:
    """Batches 1..steps of some examples."""

    def __init__(
        self,
        examples: Many,
        *,
        time: int,
        batch_size: int,
        micro_batches: int = 1,
        steps: int | None = None,
        epochs: float = 1,
        seed: int = 0,
        packing: bool | str = True,
        shuffle: bool = True,
        virtual: range = NONE,
        sources: Sources | None = None,
        share_prefix: bool = False,
    ):
        """time: tokens of a row, no example is longer; steps: wins over epochs, which may be a fraction.

        virtual: ids that are put before every example, and take of `time`. sources: of several. share_prefix: what
        all examples begin with is put into a pack once; without packing it does nothing.

        Raises:
            ConfigError: so many epochs come to no step, or to more than there may be.
        """
        self.examples, self.virtual, self.sources = examples, virtual, sources
        self.shape = (micro_batches, batch_size // micro_batches, time)
        self.share_prefix = share_prefix and bool(packing)
        start = len(virtual) + examples.common_start if self.share_prefix else 0
        self.shared = start if start >= WORTH_SHARING else 0  # tokens of a pack's start, virtual ones too
        self._order: dict[str, Any] = {"seed": seed, "packing": packing, "shuffle": shuffle}
        self._epochs: dict[int, Epoch] = {}  # the last few that were asked for
        self._ends = [0]  # the stream's rows before each epoch, and in all
        self._lock = threading.Lock()
        self._limit = None if steps is not None else self._rows_of_a_run(epochs)  # rows of the stream; None: no end
        self.steps: int = steps if steps is not None else -(-self.rows_of(epochs) // batch_size)

    @property
    def batch_size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def packing(self) -> bool:
        return bool(self._order["packing"])

    @property
    def rows(self) -> int:
        """Rows of the first epoch: packs, or examples."""
        return self._rows_before(1)

    @cached_property
    def one_each(self) -> bool:
        """No row holds two examples: they are not packed, or no two of them fit into a row."""
        lengths = self.examples.lengths
        if self.sources is not None and self.sources.weights is not None:
            lengths = np.repeat(lengths.min(), 2)  # an example may come twice in an epoch
        if not self.packing or len(lengths) < 2:
            return True
        both = np.partition(lengths, 1)[:2].sum() + 2 * len(self.virtual) - self.shared
        return bool(both > self.shape[-1])

    def first_rows(self, count: int, packs: bool) -> "Dataset":
        """A data set of the same examples (of a stream, those of its first block), whose first batch is their first
        `count` rows: as this one packs and shuffles them, or, without `packs`, one example each as they come."""
        order, time = {**self._order, "share_prefix": self.share_prefix}, self.shape[-1]
        if not packs:
            order |= {"packing": False, "shuffle": False}
            longest = int(self.examples.lengths.max()) + len(self.virtual)
            time = min(time, -(-longest // TIME_MULTIPLE) * TIME_MULTIPLE)
        return Dataset(self.examples, time=time, batch_size=count, virtual=self.virtual, sources=self.sources, **order)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that determines the stream: the examples, their order and the batches' size."""
        settings = {**self._order, "time": self.shape[-1], "batch_size": self.batch_size, "version": STREAM_VERSION}
        if self.virtual:
            settings["virtual"] = [self.virtual.start, self.virtual.stop]
        if self.shared:
            settings["shared"] = self.shared
        if self.sources is not None and self.sources.weights is not None:
            settings["sources"] = [self.sources.counts, self.sources.weights]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        self.examples.add_to(digest)
        return digest.hexdigest()

    def batch(self, step: int, rows: Container[int] | None = None) -> Batch:
        """The batch of `step`, counted from 1. The last one is filled up with empty rows.

        rows: those to make, counted through all micro-batches; the others are left empty. None: all.
        """
        if not 1 <= step <= self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        size, time = self.batch_size, self.shape[-1]
        batch = Batch(*(np.zeros((size, time), kind) for kind in ("i4", "i4", "?", "i4", "i4")))
        taken: list[tuple[Many, np.ndarray]] = []
        for row, index in enumerate(range((step - 1) * size, step * size)):
            if (rows is None or row in rows) and (self._limit is None or index < self._limit):
                examples, members = self._row(index)
                self._fill(batch, row, examples, members)
                taken.append((examples, members))
        sizes = [len(members) for _, members in taken]
        repeated = sum(sizes) - sum(size > 0 for size in sizes) if self.shared else 0
        virtual = len(self.virtual) * (sum(sizes) - repeated)
        spared = (self.shared - len(self.virtual)) * repeated
        arrays = [array.reshape(self.shape) for array in batch.arrays().values()]
        return Batch(*arrays, virtual=virtual, spared=spared, sources=self._of_sources(taken))

    def batches(self, first_step: int = 1, rows: Container[int] | None = None) -> Iterator[Batch]:
        """The batches from `first_step` to the last, made ahead of time by a thread; `rows` as `batch` has it."""
        if first_step > self.steps:
            return iter(())
        steps = grain.MapDataset.range(first_step, self.steps + 1)
        return iter(steps.map(lambda step: self.batch(int(step), rows)).to_iter_dataset(_READ))

    def _fill(self, batch: Batch, row: int, examples: Many, members: np.ndarray) -> None:
        """Write the examples `members` one after another into a row."""
        at, before = 0, np.array(self.virtual, np.int32)
        for segment, example in enumerate(members, 1):
            own, learnt = examples.read(example)
            first = self.shared if at else 0  # the others begin after what the first has brought
            tokens = np.concatenate([before, own])[first:]
            mask = np.concatenate([np.zeros(len(before), bool), learnt])[first:]
            here, targets = slice(at, at + len(tokens)), slice(at, at + len(tokens) - 1)
            batch.tokens[row, here] = tokens
            batch.targets[row, targets] = np.where(mask[1:], tokens[1:], 0)
            batch.mask[row, targets] = mask[1:]
            batch.positions[row, here] = np.arange(first, first + len(tokens))
            batch.segments[row, here] = segment
            at += len(tokens)
        batch.segments[row, : self.shared] = SHARED

    def _of_sources(self, taken: list[tuple[Many, np.ndarray]]) -> dict[str, int]:
        """Of several sources: how many of these rows' examples each has."""
        if self.sources is None:
            return {}
        return self.sources.count(np.concatenate([np.zeros(0, np.int64), *(members for _, members in taken)]))

    def _row(self, index: int) -> tuple[Many, np.ndarray]:
        """What row `index` of the stream is made of: some examples, and which of them."""
        while self._ends[-1] <= index:
            self._rows_before(len(self._ends))
        epoch = bisect_right(self._ends, index) - 1
        return self.examples, self._epoch(epoch).row(index - self._ends[epoch])

    def _rows_before(self, epoch: int) -> int:
        """The stream's rows before an epoch, counted from 0."""
        while len(self._ends) <= epoch:
            self._epoch(len(self._ends) - 1)
        return self._ends[epoch]

    def _epoch(self, number: int) -> Epoch:
        """Epoch `number`, counted from 0. Few are kept: they are planned again when somebody goes back."""
        with self._lock:
            if number not in self._epochs:
                if len(self._epochs) == KEPT:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[number] = self._plan(number)
                if number == len(self._ends) - 1:
                    self._ends.append(self._ends[-1] + len(self._epochs[number]))
            return self._epochs[number]

    def _plan(self, epoch: int) -> Epoch:
        lengths: np.ndarray = self.examples.lengths + len(self.virtual) - self.shared
        mixed = self.sources.order(self._order["seed"], epoch, self._order["shuffle"]) if self.sources else None
        return plan_epoch(lengths, self.shape[-1] - self.shared, epoch=epoch, order=mixed, **self._order)

    def _rows_of_a_run(self, epochs: float) -> int:
        steps = epochs * self.rows / self.batch_size  # nearly: epochs have not quite the same number of packs
        if steps > LARGEST:
            raise ConfigError(f"train.epochs {epochs:g}: some {steps:.2g} steps; allowed: {LARGEST} at most; lower it")
        rows = self.rows_of(epochs)
        if not rows:
            raise ConfigError(f"train.epochs {epochs:g}: no row, and so no step, of the {self.rows} rows; raise it")
        return rows

    def rows_of(self, epochs: float) -> int:
        """Rows of the stream in so many epochs; of a part of an epoch, that part of its rows, rounded up."""
        whole, part = int(epochs), epochs - int(epochs)
        rows = self._rows_before(whole)
        return rows + (math.ceil(part * (self._rows_before(whole + 1) - rows) - 1e-9) if part else 0)
