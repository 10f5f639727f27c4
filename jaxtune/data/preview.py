"""`jaxtune preview`: rows as the model sees them, in the terminal. The page of --html is preview_html.py's.

Everything is read, rendered, tokenised and packed as a run does it; of the model only settings and tokenizer are read.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxtune import tune
from jaxtune.assemble import Source
from jaxtune.config import Config
from jaxtune.console import console, say, stage
from jaxtune.data.loader import Batch, Dataset, build_data
from jaxtune.data.report import check_positions, print_summary
from jaxtune.errors import ConfigError, OutputError
from jaxtune.files import expanded, is_disks, write_whole
from jaxtune.segments import PADDING, SHARED

_TALKS = ("alpaca", "sharegpt", "messages")  # formats of conversations
PAGE = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Rows as the model sees them</title>'
_BROKEN = "\ufffd"  # what a decoder puts for bytes that are no character, or not yet one
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}


@dataclass(frozen=True)
class Token:
    """One place of a row."""

    id: int
    text: str  # what it adds to the text; empty where a later token ends the character that it begins
    position: int  # in its document, from 0
    supervised: bool  # whether the loss is on it, as the target of the token before
    special: bool
    virtual: bool
    target: int | None  # the id that is to be predicted here; None: nothing is


@dataclass(frozen=True)
class Document:
    """A conversation or a text in a row."""

    number: int  # its segment, from 1; SHARED: what the others of the row begin with
    start: int  # its first place in the row
    tokens: list[Token]

    @cached_property
    def turns(self) -> list[int]:
        """How many tokens each supervised stretch has: of a conversation, each of the assistant's turns."""
        return [len(list(run)) for on, run in groupby(self.tokens, lambda token: token.supervised) if on]

    @property
    def supervised(self) -> int:
        return sum(self.turns)

    def title(self, name: str, row: int | None) -> str:
        """What it is called. name: of its kind; row: that it has for itself."""
        return "shared start" if self.number == SHARED else f"{name} {row or self.number}"

    def caption(self, name: str) -> str:
        """Its numbers, in words. name: what it is called."""
        first, last = self.tokens[0], self.tokens[-1]
        share = "none" if not self.turns else f"{self.supervised:,}"
        stretches = f" in {len(self.turns)} turns: {' + '.join(map(str, self.turns))}" if len(self.turns) > 1 else ""
        return (
            f"{name}: {len(self.tokens):,} tokens, positions {first.position:,} to {last.position:,}, "
            f"{share} supervised{stretches}"
        )


@dataclass(frozen=True)
class SeenRow:
    """One row of a batch."""

    number: int  # in the epoch, from 1
    documents: list[Document]
    padding: int

    def caption(self, packs: bool) -> str:
        """Its numbers, in words. packs: its padding is what the run has."""
        tokens = sum(len(document.tokens) for document in self.documents)
        supervised = sum(document.supervised for document in self.documents)
        words = f"Row {self.number}: {tokens:,} tokens, {supervised:,} supervised ({supervised / tokens:.1%})"
        return f"{words}, {self.padding:,} padding" if packs else words


def preview(config: Config, rows: int, html: Path | None = None, packs: bool = False) -> None:
    """Show what a run says of its data before the first step, and the first rows of the first epoch.

    packs: as the run packs, shuffles and pads them; else one conversation each, in the order of the files.
    html: a page to write, in place of the terminal.

    Raises:
        UserError: as a run of this configuration would, its weights aside.
    """
    if html is not None:
        _check_page(html)
    config = config.model_copy(update={"tune": tune.resolve(config.tune)})
    stage(f"Reading the tokenizer of {config.model.tokenizer or config.model.path}")
    source = Source.open(config.model, config.data.template, config.tune, weights=False)
    stage("Reading the data")
    virtual, vocab_size = tune.virtual_ids(config.tune, source.config), tune.vocab_size(config.tune, source.config)
    data = build_data(config.data, config.eval, config.train, source.tokenizer, virtual, vocab_size)
    print_summary(data, console)
    check_positions(data.train, source.config)
    first = data.train.first_rows(rows, packs)
    whole = f"{first.rows:,} {_all_rows(config)}"
    seen = list(look(first.batch(1), source.tokenizer, first.virtual))
    name = "conversation" if any(part.format in _TALKS for part in config.data.parts) else "text"
    if html is None:
        print_rows(seen, name, packs, console)
        say(f"{len(seen):,} of {whole}")
        return
    from jaxtune.data.preview_html import page

    try:
        write_whole(expanded(html), page(seen, name, packs, _facts(config, first)))
    except OSError as error:
        kind = OutputError if is_disks(error) else ConfigError
        raise kind(f"--html {html}: cannot be written: {error.strerror}") from None
    say(f"{html}: {len(seen):,} of {whole}; open it in a browser")


def _check_page(html: Path) -> None:
    """Refuse to write over a file that is no page of ours: the configuration, say, or the data."""
    try:
        path = expanded(html)
        if not path.is_file():
            return
        with path.open("rb") as file:
            found = file.read(len(PAGE))
    except OSError as error:
        raise ConfigError(f"--html {html}: cannot be written: {error.strerror}") from None
    if found not in (b"", PAGE.encode()):
        raise ConfigError(f"--html {html}: is there already and is no page of preview's; give another name")


def _facts(config: Config, first: Dataset) -> dict[str, str]:
    """What a reader of the page wants to know of where its rows come from."""
    paths = [path for part in config.data.parts for path in part.paths]
    return {
        "model": config.model.tokenizer or config.model.path,
        "data": ", ".join(paths),
        "template": config.data.template or "the tokenizer's own",
        "max_length": f"{config.data.max_length:,}",
        _all_rows(config): f"{first.rows:,}",
    }


def _all_rows(config: Config) -> str:
    return f"rows of the first {'block' if config.data.streaming else 'epoch'}"


def look(batch: Batch, tokenizer: Any, virtual: range) -> Iterator[SeenRow]:
    """The rows of a batch that are not empty, token by token."""
    arrays = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.arrays().items()}
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for row, segments in enumerate(arrays["segments"]):
        found = [number for number in np.unique(segments).tolist() if number != PADDING]
        parts = {name: array[row] for name, array in arrays.items()}
        documents = [_document(number, parts, tokenizer, special, virtual) for number in found]
        if documents:
            yield SeenRow(row + 1, documents, int(np.count_nonzero(segments == PADDING)))


def _document(number: int, row: dict[str, np.ndarray], tokenizer: Any, special: set[int], virtual: range) -> Document:
    places = np.flatnonzero(row["segments"] == number)
    ids, positions, mask, targets = (row[name][places].tolist() for name in ("tokens", "positions", "mask", "targets"))
    before = sum(token in virtual for token in ids)
    texts = [""] * before + pieces(tokenizer, ids[before:])
    tokens = [
        Token(token, text, position, learnt, token in special, token in virtual, target if on else None)
        for token, text, position, learnt, on, target in zip(
            ids, texts, positions, [False, *mask[:-1]], mask, targets, strict=True
        )
    ]
    return Document(number, int(places[0]), tokens)


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds to the text of those before it; joined, they are the decoded text.

    A character that several tokens spell stands at the last of them.
    """
    found: list[str] = []
    # The window begins with tokens whose text is known already: some decoders write a token as what precedes it asks.
    window: list[int] = []
    shown, known = "", 0  # the text of the first `known` tokens in the window
    for at, token in enumerate(ids):
        window.append(token)
        text = _decode(tokenizer, window)
        if text.endswith(_BROKEN) and at + 1 < len(ids) and len(window) - known < 8:
            found.append("")
            continue
        found.append(text[len(shown) :])
        window = window[known:]
        shown, known = _decode(tokenizer, window), len(window)
    return found


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def visible(text: str) -> str:
    """Text whose control characters, line breaks and tabs aside, can be seen, and do nothing to a terminal."""
    text = text.translate(_VISIBLE)
    return "".join(c if unicodedata.category(c) != "Cc" or c in "\n\t" else _BROKEN for c in text)


def print_rows(rows: list[SeenRow], name: str, packs: bool, console: Console) -> None:
    """Each row with its numbers and its text, the supervised part in green or, without colours, between « and ».

    name: what a document is called.
    """
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    for row in rows:
        console.print()
        if packs:
            console.print(Text(row.caption(packs)), style="bold", soft_wrap=True)
        for document in row.documents:
            title = document.caption(document.title(name, None if packs else row.number))
            console.print(Text(f"── {title}"), style="dim" if coloured else "", soft_wrap=True)
            console.print(_text(document, coloured), soft_wrap=True)
    console.print()


def _text(document: Document, coloured: bool) -> Text:
    text = Text()
    virtual = sum(token.virtual for token in document.tokens)
    if virtual:
        text.append(f"[{virtual:,} virtual tokens]", style="italic dim" if coloured else "")
    for on, run in groupby(document.tokens[virtual:], lambda token: token.supervised):
        words = visible("".join(token.text for token in run))
        if coloured:
            text.append(words, style="bold green" if on else "dim")
        else:
            text.append(f"«{words}»" if on else words)
    return text
