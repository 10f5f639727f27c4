"""From a configuration to the data of a run: the training and the held-out data set."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxtune.config import DataSection, EvalSection, TrainSection
from jaxtune.data.cache import cached
from jaxtune.data.dataset import NONE, TIME_MULTIPLE, Batch, Dataset
from jaxtune.data.documents import read_documents
from jaxtune.data.encode import Lengths
from jaxtune.data.examples import Chosen, Many, concatenate
from jaxtune.data.formats import Rows
from jaxtune.data.locate import held_source, with_files
from jaxtune.data.mixing import Sources
from jaxtune.data.packing import shuffled
from jaxtune.data.streaming import Named, Stream, open_stream
from jaxtune.data.template import open_template
from jaxtune.data.tokenise import Tokenising
from jaxtune.data_section import TEXTS, MixedSource, SourceSection
from jaxtune.errors import ConfigError, DataError, listing
from jaxtune.tokenizer import vocabulary_size

__all__ = ["Batch", "Data", "Dataset", "Part", "build_data", "check_sections"]

LEAST = 2  # tokens of a conversation: one to be asked with, one to learn


@dataclass(frozen=True)
class Part:
    """The tokens of one source, and what was seen when they were made."""

    section: SourceSection
    examples: Many
    rows: Rows  # without the rows
    lengths: Lengths
    notes: list[str] = field(default_factory=list)
    held_out: bool = False


@dataclass(frozen=True)
class Data:
    """The data sets of a run."""

    train: Dataset
    eval: Dataset | None
    sources: list[Part]  # the data's, and eval.path's if it is set
    section: DataSection
    tokenizer: Any
    notes: list[str]  # what the user should know though the data is not wrong

    @property
    def one_each(self) -> bool:
        """No row of a batch holds two examples."""
        return all(data.one_each for data in (self.train, self.eval) if data is not None)

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
        ConfigError: of check_sections; or train.batch_size does not split into train.micro_batches.
    """
    check_sections(section, eval_section, train, virtual)
    if train.batch_size % train.micro_batches:
        raise ConfigError(
            f"train.batch_size {train.batch_size} does not split into train.micro_batches {train.micro_batches}; "
            "it must be a multiple"
        )
    size = max(vocab_size, vocabulary_size(tokenizer))
    sources, held_out = _named(section, eval_section)
    if section.streaming:
        parts = list(_parts(held_out, section, tokenizer, len(virtual), size))
        order = _order(section, train, section.max_length, virtual)
        names = _names([source for source, _ in sources])
        stream = open_stream(sources, names, section, tokenizer, steps=train.steps, shuffle=section.shuffle, **order)
        evaluation = Dataset(parts[0].examples, shuffle=False, **order) if parts else None
        return Data(stream, evaluation, [_first_block(stream, sources), *parts], section, tokenizer, stream.notes)
    parts = list(_parts([*sources, *held_out], section, tokenizer, len(virtual), size))
    notes = list(dict.fromkeys(note for part in parts if not part.held_out for note in part.notes))
    examples = concatenate([part.examples for part in parts if not part.held_out])
    held: Many | None = next((part.examples for part in parts if part.held_out), None)
    ends = np.cumsum([len(part.examples) for part in parts if not part.held_out])
    # Of eval.path, which may change under a run, the training rows know nothing; eval.fraction is of these examples.
    order = _order(section, train, _row_length(examples, section, len(virtual)), virtual)
    if eval_section.fraction:
        examples, held = _hold_out(examples, _owners(parts), eval_section.fraction, train.seed)
    mixed = _sources(parts, examples, ends)
    training = Dataset(
        examples, sources=mixed, shuffle=section.shuffle, steps=train.steps, epochs=train.epochs, **order
    )
    evaluation = None
    if held is not None:
        order["time"] = max(order["time"], _row_length(held, section, len(virtual)))
        evaluation = Dataset(held, shuffle=False, **order)
    return Data(training, evaluation, parts, section, tokenizer, notes)


def _order(section: DataSection, train: TrainSection, time: int, virtual: range) -> dict[str, Any]:
    """What the training and the held-out data set have in common."""
    return {
        "time": time,
        "batch_size": train.batch_size,
        "micro_batches": train.micro_batches,
        "seed": train.seed,
        "packing": section.packing,
        "share_prefix": section.share_prefix,
        "virtual": virtual,
    }


def check_sections(section: DataSection, eval_section: EvalSection, train: TrainSection, virtual: range) -> None:
    """Refuse what no data can mend.

    Raises:
        ConfigError: data.max_length has no room for more than the virtual tokens, or a stream would have to be counted.
    """
    if section.max_length - len(virtual) < LEAST:
        raise ConfigError(
            f"data.max_length {section.max_length}: tune.num_virtual_tokens {len(virtual)} of them stand before every "
            f"conversation, which needs {LEAST} tokens at least; raise it, or lower tune.num_virtual_tokens"
        )
    if section.streaming and train.steps is None:
        raise ConfigError("data.streaming: nobody knows how many rows an epoch has; set train.steps")
    if section.streaming and eval_section.fraction:
        raise ConfigError("data.streaming: a share of rows that nobody has counted cannot be held out; set eval.path")


def _first_block(stream: Stream, sources: list[Named]) -> Part:
    """What is known of a stream before the first step."""
    paths = [path for source, _ in sources for path in source.paths]
    seen, lengths = stream.first_block
    return Part(sources[0][0].model_copy(update={"path": paths}), stream.examples, seen, lengths)


def _named(section: DataSection, eval_section: EvalSection) -> tuple[list[Named], list[Named]]:
    """The sources, and eval.path, which is read as the first of them is; each with the setting that names it."""
    sources = section.parts
    keys = [f"data.sources.{number}.path" if section.sources else "data.path" for number in range(len(sources))]
    keys = [f"data.dataset {name}" for name in section.datasets] or keys
    held = [] if eval_section.path is None else [(held_source(sources[0], eval_section), "eval.path")]
    named = [(_found(source, key), key) for source, key in zip(sources, keys, strict=True)]
    return named, [(_found(source, key), key) for source, key in held]


def _found(source: SourceSection, key: str) -> SourceSection:
    """A source with its files; those of format megatron are found by whoever opens them."""
    if source.format == "megatron":
        return source
    return with_files(source, key, "validation" if key == "eval.path" else "train")


def _parts(sources: list[Named], section: DataSection, tokenizer: Any, virtual: int, vocab_size: int) -> Iterator[Part]:
    """Each source's tokens."""
    with ExitStack() as stack:
        talks = any(source.format not in TEXTS for source, _ in sources)
        template = stack.enter_context(open_template(tokenizer, section.template)) if talks else None
        for source, key in sources:
            if source.format == "megatron":
                documents, lengths = read_documents(source.paths, section, virtual, vocab_size, key)
                yield Part(source, documents, Rows(), lengths, [], key == "eval.path")
                continue
            own = template if source.format != "text" else None
            found = cached(Tokenising(source, key, section, tokenizer, own, virtual), section.cache)
            yield Part(source, found.examples, found.rows, found.lengths, found.notes, key == "eval.path")


def _sources(parts: list[Part], examples: Many, ends: np.ndarray) -> Sources | None:
    """Of several sources, what of the training data is of each. ends: where each ended before any was held out."""
    sources = [part.section for part in parts if isinstance(part.section, MixedSource) and not part.held_out]
    names = _names(sources)
    if not names:
        return None
    indices = examples.indices if isinstance(examples, Chosen) else np.arange(len(examples))
    counts = np.diff(np.searchsorted(indices, ends), prepend=0).tolist()
    weights = tuple(source.weight for source in sources if source.weight is not None)
    if weights and 0 in counts:
        raise DataError(f"data.sources: nothing is left of {names[counts.index(0)]}, which has a weight")
    return Sources(tuple(names), tuple(counts), weights or None)


def _names(sources: Sequence[SourceSection]) -> list[str]:
    """In reports and metrics, of several sources; of one alone none."""
    names: list[str] = []
    for source in sources if len(sources) > 1 else ():
        name = (source.name if isinstance(source, MixedSource) else None) or listing(source.paths, 2)
        names.append(f"{name} ({names.count(name) + 1})" if name in names else name)
    return names


def _owners(parts: list[Part]) -> np.ndarray:
    """A number for each example, through all parts: int64. Where num_samples took rows again, copies have the same."""
    owners: list[np.ndarray] = []
    count = 0
    for part in parts:
        own = _distinct(part.examples) if part.rows.again else np.arange(len(part.examples))
        owners.append(count + own)
        count += int(own.max(initial=-1)) + 1
    return np.concatenate(owners)


def _distinct(examples: Many) -> np.ndarray:
    """A number for each example, the same for those that are the same: int64."""
    numbers: dict[bytes, int] = {}
    read = (examples.read(index) for index in range(len(examples)))
    digests = (hashlib.sha256(tokens.tobytes() + mask.tobytes()).digest() for tokens, mask in read)
    return np.array([numbers.setdefault(digest, len(numbers)) for digest in digests], np.int64)


def _hold_out(examples: Many, owners: np.ndarray, fraction: float, seed: int) -> tuple[Chosen, Chosen]:
    """(training, held out): whole examples, chosen by seed, those of one owner together; at least one of each."""
    count = int(owners.max(initial=-1)) + 1
    if count < 2:
        raise DataError(f"eval.fraction {fraction}: only {count} row is left to learn from; at least 2 are needed")
    order = shuffled(count, "held out", seed)
    held: np.ndarray = np.zeros(count, bool)
    held[order[: min(max(1, round(fraction * count)), count - 1)]] = True
    out = held[owners]
    whole = examples if isinstance(examples, Chosen) else Chosen([examples], np.arange(len(examples)))
    return whole.take(np.flatnonzero(~out)), whole.take(np.flatnonzero(out))


def _row_length(examples: Many, section: DataSection, virtual: int) -> int:
    """Tokens of a row: max_length when packing, else the longest example's rounded up, at most max_length."""
    if section.packing:
        return section.max_length
    longest = virtual + int(examples.lengths.max())
    return min(section.max_length, -(-longest // TIME_MULTIPLE) * TIME_MULTIPLE)
