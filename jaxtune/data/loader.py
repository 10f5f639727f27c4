"""From a configuration to batches: the training and the held-out data set, each batch a pure function of its step.

The stream of a data set is its epochs' rows, one epoch after another; step s trains on rows (s-1)*B up to s*B of it,
B being train.batch_size. So neither devices nor processes nor where a run was interrupted have a say in the order,
and the state of the data is the step. All batches of a run have one shape, [micro_batches, rows, time].

A tuning method may have virtual tokens, ids past the vocabulary: they are put before every example as it is written
into a row, take their room there, and are counted nowhere.
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

from jaxtune.config import DataSection, EvalSection, TrainSection
from jaxtune.data.chat import special_tokens
from jaxtune.data.documents import Documents, read_documents
from jaxtune.data.encode import Examples, Lengths, encode
from jaxtune.data.formats import Row, Rows, read_rows
from jaxtune.data.packing import Epoch, plan_epoch, shuffled
from jaxtune.data.template import ChatTemplate, open_template
from jaxtune.errors import ConfigError, DataError
from jaxtune.tokenizer import vocabulary_size

STREAM_VERSION = 1  # to be raised with any change of order or packing, so that an old run is not resumed on a new one
TIME_MULTIPLE = 64  # unpacked rows are padded to one
NONE = range(0)  # no virtual tokens
LEAST = 2  # tokens of a conversation: one to be asked with, one to learn
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


@dataclass(frozen=True)
class Batch:
    """What one step trains on. Every array is [micro_batches, rows, time]."""

    tokens: np.ndarray  # int32; 0 where there is padding
    targets: np.ndarray  # int32, the token that follows; 0 where it is not supervised
    mask: np.ndarray  # bool, where the target is supervised
    positions: np.ndarray  # int32, from 0 in each document
    segments: np.ndarray  # int32, 1, 2, ... for the documents of a row; 0: padding
    virtual: int = field(default=0, kw_only=True)  # how many of its tokens are virtual

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "virtual"}

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
        examples: Examples | Documents,
        *,
        time: int,
        batch_size: int,
        micro_batches: int = 1,
        steps: int | None = None,
        epochs: float = 1,
        seed: int = 0,
        packing: bool = True,
        shuffle: bool = True,
        virtual: range = NONE,
    ):
        """time: tokens of a row, no example is longer; steps: wins over epochs, which may be a fraction.

        virtual: ids that are put before every example, and take of `time`.
        """
        self.examples, self.virtual = examples, virtual
        self.shape = (micro_batches, batch_size // micro_batches, time)
        self._order: dict[str, Any] = {"seed": seed, "packing": packing, "shuffle": shuffle}
        self._epochs: list[Epoch] = []
        self._ends = [0]  # the stream's rows before each epoch, and in all
        self._lock = threading.Lock()
        self._limit = None if steps is not None else self._rows_of(epochs)  # rows of the stream; None: no end
        self.steps: int = steps if steps is not None else -(-self._rows_of(epochs) // batch_size)

    @property
    def batch_size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def packing(self) -> bool:
        return self._order["packing"]

    @property
    def rows(self) -> int:
        """Rows of the first epoch: packs, or examples."""
        return len(self._epoch(0))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that determines the stream: the examples, their order and the batches' size."""
        settings = {**self._order, "time": self.shape[-1], "batch_size": self.batch_size, "version": STREAM_VERSION}
        if self.virtual:
            settings["virtual"] = [self.virtual.start, self.virtual.stop]
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
        batch, virtual = Batch(*(np.zeros((size, time), kind) for kind in ("i4", "i4", "?", "i4", "i4"))), 0
        for row, index in enumerate(range((step - 1) * size, step * size)):
            if (rows is None or row in rows) and (self._limit is None or index < self._limit):
                members = self._stream(index)
                self._fill(batch, row, members)
                virtual += len(self.virtual) * len(members)
        return Batch(*(array.reshape(self.shape) for array in batch.arrays().values()), virtual=virtual)

    def batches(self, first_step: int = 1, rows: Container[int] | None = None) -> Iterator[Batch]:
        """The batches from `first_step` to the last, made ahead of time by a thread; `rows` as `batch` has it."""
        if first_step > self.steps:
            return iter(())
        steps = grain.MapDataset.range(first_step, self.steps + 1)
        return iter(steps.map(lambda step: self.batch(int(step), rows)).to_iter_dataset(_READ))

    def _fill(self, batch: Batch, row: int, members: np.ndarray) -> None:
        """Write the examples `members` one after another into a row."""
        at, before = 0, np.array(self.virtual, np.int32)
        for segment, example in enumerate(members, 1):
            tokens, mask = self.examples.example(example)
            tokens = np.concatenate([before, tokens])
            mask = np.concatenate([np.zeros(len(before), bool), mask])
            here, targets = slice(at, at + len(tokens)), slice(at, at + len(tokens) - 1)
            batch.tokens[row, here] = tokens
            batch.targets[row, targets] = np.where(mask[1:], tokens[1:], 0)
            batch.mask[row, targets] = mask[1:]
            batch.positions[row, here] = np.arange(len(tokens))
            batch.segments[row, here] = segment
            at += len(tokens)

    def _stream(self, index: int) -> np.ndarray:
        """The examples in row `index` of the stream."""
        while self._ends[-1] <= index:
            self._epoch(len(self._epochs))
        epoch = bisect_right(self._ends, index) - 1
        return self._epochs[epoch].row(index - self._ends[epoch])

    def _epoch(self, number: int) -> Epoch:
        """Epoch `number`, counted from 0, planned when it is first asked for."""
        with self._lock:
            while len(self._epochs) <= number:
                time = self.shape[-1]
                lengths: np.ndarray = self.examples.lengths + len(self.virtual)
                self._epochs.append(plan_epoch(lengths, time, epoch=len(self._epochs), **self._order))
                self._ends.append(self._ends[-1] + len(self._epochs[-1]))
            return self._epochs[number]

    def _rows_of(self, epochs: float) -> int:
        """Rows of the stream in so many epochs; of a part of an epoch, that part of its rows, rounded up."""
        whole, part = int(epochs), epochs - int(epochs)
        rows = sum(len(self._epoch(number)) for number in range(whole))
        return rows + (math.ceil(part * len(self._epoch(whole)) - 1e-9) if part else 0)


@dataclass(frozen=True)
class Part:
    """What is known of the files of one data set before it is made into batches."""

    paths: list[str]
    rows: Rows
    lengths: Lengths


@dataclass(frozen=True)
class Data:
    """The data sets of a run."""

    train: Dataset
    eval: Dataset | None
    sources: list[Part]  # data.path's, and eval.path's if it is set
    section: DataSection
    tokenizer: Any
    notes: list[str]  # what the user should know though the data is not wrong

    @property
    def room(self) -> int:
        """The most tokens that a conversation may have."""
        return self.section.max_length - len(self.train.virtual)

    def report(self, console: Any) -> None:
        """Print what the data is, and one example with its supervised tokens marked, on a rich console."""
        from jaxtune.data.report import print_report

        print_report(self, console)


def build_data(
    section: DataSection,
    eval_section: EvalSection,
    train: TrainSection,
    tokenizer: Any,
    virtual: range = NONE,
    vocab_size: int = 0,
) -> Data:
    """Read, template, tokenise, split and plan all data of a run.

    virtual: the ids that the tuning method puts before every conversation. vocab_size: the rows of the model's
    embedding, where they are more than the tokenizer's tokens; data that is tokenised already may have them all.

    Raises:
        DataError: a file, a row, the template or the lengths are wrong, or nothing is left to learn from.
        ConfigError: train.batch_size does not split into train.micro_batches, or data.max_length has no room for
            more than the virtual tokens.
    """
    if section.max_length - len(virtual) < LEAST:
        raise ConfigError(
            f"data.max_length {section.max_length}: tune.num_virtual_tokens {len(virtual)} of them stand before every "
            f"conversation, which needs {LEAST} tokens at least; raise it, or lower tune.num_virtual_tokens"
        )
    if train.batch_size % train.micro_batches:
        raise ConfigError(
            f"train.batch_size {train.batch_size} does not split into train.micro_batches {train.micro_batches}; "
            "it must be a multiple"
        )
    paths = {"data.path": section.path, "eval.path": eval_section.path}
    encoded: dict[str, tuple[Any, Lengths]]
    notes: list[str] = []
    if section.format == "megatron":
        size = max(vocab_size, vocabulary_size(tokenizer))
        given = {key: _listed(path) for key, path in paths.items() if path is not None}
        encoded = {key: read_documents(names, section, len(virtual), size, key) for key, names in given.items()}
        raw = {key: Rows() for key in given}
    else:
        raw = {key: read_rows(path, section, key) for key, path in paths.items() if path is not None}
        encoded, notes = _encode(raw, section, tokenizer, len(virtual))
    sources = [Part(_listed(paths[key]), raw[key], lengths) for key, (_, lengths) in encoded.items()]
    examples = encoded["data.path"][0]
    held = encoded["eval.path"][0] if "eval.path" in encoded else None
    if eval_section.fraction:
        examples, held = _hold_out(examples, eval_section.fraction, train.seed)
    time = _row_length([examples, held] if held is not None else [examples], section, len(virtual))
    shape: dict[str, Any] = {
        "time": time,
        "batch_size": train.batch_size,
        "micro_batches": train.micro_batches,
        "seed": train.seed,
        "packing": section.packing,
        "virtual": virtual,
    }
    training = Dataset(examples, shuffle=section.shuffle, steps=train.steps, epochs=train.epochs, **shape)
    evaluation = Dataset(held, shuffle=False, **shape) if held is not None else None
    return Data(training, evaluation, sources, section, tokenizer, notes)


def _listed(path: str | list[str] | None) -> list[str]:
    return [path] if isinstance(path, str) else list(path or [])


def _encode(
    raw: dict[str, Rows], section: DataSection, tokenizer: Any, virtual: int
) -> tuple[dict[str, tuple[Examples, Lengths]], list[str]]:
    """Each file set's examples, and notes on the template."""
    if section.format == "text":
        return {key: encode(rows.rows, section, tokenizer, None, virtual) for key, rows in raw.items()}, []
    with open_template(tokenizer, section.template) as template:
        encoded = {key: encode(rows.rows, section, tokenizer, template, virtual) for key, rows in raw.items()}
        spoken = [row for row in raw["data.path"].rows if any(m["role"] == "assistant" for m in row.messages or ())]
        return encoded, [] if section.train_on_prompt else _template_notes(template, tokenizer, spoken)


def _template_notes(template: ChatTemplate, tokenizer: Any, spoken: list[Row]) -> list[str]:
    """Surprises that a template holds. spoken: rows in which the assistant speaks."""
    notes = []
    if "strftime_now" in template.source:
        notes.append("The template may write today's date; here it is always 26 July 2024, so that a run can resume.")
    if template.has_marks and spoken:
        answer = next(template.render([(spoken[0].where, spoken[0].messages or [])]))
        ends = [special_tokens(tokenizer).match(answer["text"], end) for _, end in answer["marks"]]
        if ends and ends[0]:
            notes.append(
                f"The template's {{% generation %}} blocks leave out the {ends[0].group()} that follows them: "
                "the model will not learn to end its turn."
            )
    return notes


def _hold_out(examples: Examples | Documents, fraction: float, seed: int) -> tuple[Any, Any]:
    """(training, held out): whole examples, chosen by seed; at least one of each."""
    count = len(examples)
    if count < 2:
        raise DataError(f"eval.fraction {fraction}: only {count} row is left to learn from; at least 2 are needed")
    order = shuffled(count, "held out", seed)
    held = min(max(1, round(fraction * count)), count - 1)
    return examples.take(np.sort(order[held:])), examples.take(np.sort(order[:held]))


def _row_length(parts: list[Examples | Documents], section: DataSection, virtual: int) -> int:
    """Tokens of a row: max_length when packing, else the longest example's rounded up, at most max_length."""
    if section.packing:
        return section.max_length
    longest = virtual + max(int(part.lengths.max()) for part in parts)
    return min(section.max_length, -(-longest // TIME_MULTIPLE) * TIME_MULTIPLE)
