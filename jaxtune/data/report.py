"""What a person reads of the data before the first step: its numbers, and one example with its targets marked."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxtune.console import warn
from jaxtune.data.dataset import WORTH_SHARING
from jaxtune.data.encode import Lengths
from jaxtune.data.loader import Data, Dataset
from jaxtune.data.mixing import Sources
from jaxtune.data.streaming import Stream
from jaxtune.data.tokenise import bad_rows
from jaxtune.errors import listing
from jaxtune.models.config import ModelConfig

FEWEST, LOOKED_AT = 100, 1000  # conversations, for what they begin with
WORTH_TELLING = 0.1  # of their mean length
SHOWN = 400  # tokens of the example; a longer one is cut in the middle
_STYLE = "bold green"


def check_positions(data: Dataset, model: ModelConfig, option: str = "data.max_length") -> None:
    """Warn where a conversation is longer than the model knows positions; of a stream, one of the first block. Some
    ways of scaling positions are there to go on behind the last that is known.

    option: what cuts it.
    """
    longest, known = int(data.examples.lengths.max()) + len(data.virtual), model.max_positions
    if longest > known and model.rope.type not in ("linear", "dynamic", "yarn"):
        warn(
            f"{option}: the longest example has {longest:,} tokens, and the model knows {known:,} positions "
            f"(max_position_embeddings): what lies behind them it has not seen; lower {option} to {known:,}"
        )


def print_report(data: Data, console: Console) -> None:
    """The whole report. Where nothing has to be said, nothing is."""
    print_summary(data, console)
    _print_example(data, console)


def print_summary(data: Data, console: Console) -> None:
    """The report without its example."""
    for source in data.sources:
        counts = source.lengths
        first = "the first " if source.examples is data.train.examples and isinstance(data.train, Stream) else ""
        line = f"{listing(source.section.paths, 3)}: {first}{counts.rows:,} rows, {_fate(counts, data.room)}"
        _line(console, line, "yellow" if counts.dropped or counts.truncated else "")
    console.print(_table(data))
    if data.train.sources is not None:
        console.print(_source_table(data.train, data.train.sources))
    _line(console, _steps(data.train))
    for note in _notes(data):
        _line(console, f"Note: {note}", "yellow")


def _line(console: Console, text: str | Text, style: str = "") -> None:
    console.print(Text(text) if isinstance(text, str) else text, style=style, soft_wrap=True)


def _table(data: Data) -> Table:
    """One column of numbers for each data set."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    sets = {"train": data.train} | ({"held out": data.eval} if data.eval else {})
    for name in sets:
        table.add_column(name, justify="right")
    columns = [_numbers(part) for part in sets.values()]
    for labels in zip(*columns, strict=True):
        for label in dict.fromkeys(labels):  # they differ where the two have rows of another length
            table.add_row(label, *(column.get(label, "") for column in columns))
    return table


def _source_table(train: Dataset, sources: Sources) -> Table:
    """One row for each source."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("source")
    for name in ("examples", "share", "epochs"):
        table.add_column(name, justify="right")
    seen = _epochs(train) * sum(sources.counts)
    for name, count, share in zip(sources.names, sources.counts, sources.shares, strict=True):
        table.add_row(Text(name), f"{count:,}", f"{share:.1%}", _number(share * seen / count) if count else "0")
    return table


def _epochs(train: Dataset) -> float:
    """How many epochs of the stream the run makes."""
    return train.steps * train.batch_size / train.rows


def _numbers(part: Dataset) -> dict[str, str]:
    lengths, time = part.examples.lengths, part.shape[-1]
    tokens = part.examples.num_tokens
    virtual = len(part.virtual) * len(lengths)
    spared = part.shared * (len(lengths) - part.rows)
    kind = "packs" if part.packing else "rows"
    return {
        "conversations": f"{len(lengths):,}",
        "tokens": f"{tokens:,}",
        "mean length": _number(tokens / len(lengths)),
        "longest": f"{int(lengths.max()):,}",
        "supervised": f"{part.examples.num_supervised / tokens:.1%}",
        **({"virtual tokens before each": f"{len(part.virtual):,}"} if virtual else {}),
        **({"shared by all, once a pack": f"{part.shared:,}"} if part.share_prefix else {}),
        f"{kind} of {time:,} tokens": f"{part.rows:,}",
        "padding": f"{1 - (tokens + virtual - spared) / (part.rows * time):.1%}",
    }


def _steps(train: Dataset) -> str:
    steps = f"{train.steps:,} step{'s' * (train.steps != 1)} of {train.batch_size:,} sequences"
    if isinstance(train, Stream):
        return f"{steps}; what follows in the stream is not known yet"
    return f"{steps}: {_number(train.rows / train.batch_size)} an epoch, {_number(_epochs(train))} epochs"


def _notes(data: Data) -> list[str]:
    """What may be a mistake in the data."""
    notes = []
    for rows, counts in ((source.rows, source.lengths) for source in data.sources):
        if rows.bad + counts.bad:
            notes.append(f"Bad rows that were left out: {bad_rows(rows, counts).told(counts.rows)}.")
        if rows.unused:
            names = (f'"{name}" (in {count:,} rows)' for name, count in sorted(rows.unused.items()))
            notes.append(f"Columns that are not read: {listing(names)}; data.columns says which are.")
        if rows.odd:
            notes.append(
                f"Left out, as LLaMA-Factory does: {rows.odd:,} rows without an answer, or whose turns do not "
                f"alternate; the first is {rows.odd_first}."
            )
        if rows.empty_answers:
            notes.append(
                f"Rows with an empty answer: {rows.empty_answers:,}, the first is {rows.empty_first}; of such a turn "
                "only the end is learnt, which is to say nothing."
            )
        if counts.special:
            notes.append(
                f"Rows whose text holds a special token: {counts.special:,}, the first is {counts.special_first}; the "
                "model sees it as the template's own, where a turn ends or begins."
            )
        if counts.shared_starts:
            notes.append(
                f"In {counts.shared_starts:,} assistant turns the prompt and the answer share a token, which "
                "generation cannot reproduce; the template's prompt or these answers have white space to lose."
            )
    return [*notes, *_repeated(data.train), *_shared(data), *data.notes]


def _repeated(train: Dataset) -> list[str]:
    """Whether a step goes through the data more than once."""
    if isinstance(train, Stream) or train.batch_size <= train.rows:
        return []
    kind = ("pack" if train.packing else "row") + "s" * (train.rows > 1)
    return [
        f"One step trains on every row {_number(train.batch_size / train.rows)} times: an epoch has {train.rows:,} "
        f"{kind}, and train.batch_size is {train.batch_size:,}; lower it."
    ]


def _shared(data: Data) -> list[str]:
    """Whether there is a start to share that is not, or none where it was asked for."""
    train = data.train
    if train.share_prefix and not train.shared:
        return ["data.share_prefix: the conversations have no start in common that is long enough; nothing is shared."]
    if train.share_prefix or not train.packing or isinstance(train, Stream):
        return []
    first = train.examples.take(np.arange(min(LOOKED_AT, len(train.examples))))
    start, mean = first.common_start, first.num_tokens / len(first)
    if len(first) < FEWEST or start < max(WORTH_SHARING, WORTH_TELLING * mean):
        return []
    which = "All" if len(first) == len(train.examples) else "The first"
    return [
        f"{which} {len(first):,} conversations begin with the same {start} tokens, {start / mean:.0%} of their mean "
        "length; data.share_prefix: true computes them once in each pack (docs/data.md: where it can)."
    ]


def _fate(counts: Lengths, max_length: int) -> str:
    reasons = {
        f"longer than {max_length} tokens": counts.dropped_long,
        "cut before anything supervised": counts.dropped_cut,
        "without a supervised token": counts.dropped_silent,
    }
    why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
    dropped = f"{counts.dropped:,} dropped ({why})" if why else "none dropped"
    split = f", {counts.split:,} split" if counts.split else ""
    return f"{dropped}, {f'{counts.truncated:,}' if counts.truncated else 'none'} truncated{split}"


def _print_example(data: Data, console: Console) -> None:
    """The first example that is learnt from."""
    examples, coloured = data.train.examples, console.is_terminal and console.color_system is not None
    coloured = coloured and not console.no_color
    title = Text("\nOne example as the model sees it; the loss is on what stands ")
    title.append("in bold green" if coloured else "between « and »", style=_STYLE if coloured else "")
    _line(console, title.append(":"))
    _line(console, marked(*examples.read(0), data.tokenizer, coloured).append("\n"))


def marked(tokens: np.ndarray, mask: np.ndarray, tokenizer: Any, coloured: bool, shown: int = SHOWN) -> Text:
    """The text of the tokens, those with `mask` set in colour or between « and »; cut in the middle if long."""
    text = Text()
    if len(tokens) <= shown:
        return _runs(text, tokens, mask, tokenizer, coloured)
    half = shown // 2
    _runs(text, tokens[:half], mask[:half], tokenizer, coloured)
    text.append(f" [... {len(tokens) - 2 * half:,} tokens more ...] ", style="dim")
    return _runs(text, tokens[-half:], mask[-half:], tokenizer, coloured)


def _runs(text: Text, tokens: np.ndarray, mask: np.ndarray, tokenizer: Any, coloured: bool) -> Text:
    """Append runs of tokens that are, or are not, supervised."""
    edges: np.ndarray = np.flatnonzero(np.diff(mask.astype(np.int8))) + 1
    for run, on in zip(np.split(tokens, edges), np.split(mask, edges)):
        words = tokenizer.decode(run.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if on.any():
            text.append(words if coloured else f"«{words}»", style=_STYLE if coloured else "")
        else:
            text.append(words, style="dim" if coloured else "")
    return text


def _number(value: float) -> str:
    """With one decimal, unless that is 0; what is less than that, with one digit."""
    return f"{value:,.1f}".removesuffix(".0") if value >= 0.05 or not value else f"{value:.1g}"
