"""Rows to tokens: templates applied, tokenised in batches, cut to length, counted.

A chunk of rows is the unit of work, in whatever process; tokenise.py has them done one after another.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import DataSection
from jaxtune.data.chat import (
    BadBeginning,
    Span,
    learnt_turns,
    shared_starts,
    special_tokens,
    supervised_spans,
    token_mask,
)
from jaxtune.data.examples import Examples, join
from jaxtune.data.formats import Row
from jaxtune.data.pieces import split
from jaxtune.data.records import SHOWN
from jaxtune.data.template import ChatTemplate
from jaxtune.data_section import SourceSection
from jaxtune.errors import DataError

CHUNK, CHARACTERS = 512, 1 << 22  # rows that are tokenised together, and characters of them from which on fewer are
_CHARACTERS = 64  # of a text, for each token of max_length; what lies beyond is not tokenised
_MARGIN = 64  # tokens near the cut, which may not be those of the whole text


@dataclass
class Lengths:
    """What became of the rows. Those that are not dropped are the examples."""

    rows: int = 0
    too_long: int = 0  # whatever was done with them
    first_long: tuple[int, str] | None = None  # (tokens, file:line)
    longest: tuple[int, str] | None = None
    dropped_long: int = 0  # longer than max_length
    dropped_cut: int = 0  # truncated until nothing supervised was left
    dropped_silent: int = 0  # without a supervised token from the start
    truncated: int = 0  # and kept
    split: int = 0  # into pieces, all of which are kept
    shared_starts: int = 0  # assistant turns whose first token is also the prompt's last
    special: int = 0  # rows of which a message holds one of the tokenizer's special tokens
    special_first: str = ""  # the first of them, and which token
    bad: int = 0  # left out, and not among the rows: those with a BadBeginning
    bad_first: tuple[str, ...] = ()  # what is wrong with the first few of them

    @classmethod
    def of(cls, told: dict[str, Any]) -> "Lengths":
        """Those that were written as JSON."""
        values: dict[str, Any] = {name: tuple(it) if isinstance(it, list) else it for name, it in told.items()}
        return cls(**values)

    @property
    def dropped(self) -> int:
        return self.dropped_long + self.dropped_cut + self.dropped_silent

    def add_long(self, length: int, where: str) -> None:
        """Count a row that is too long."""
        self.add(Lengths(too_long=1, first_long=(length, where), longest=(length, where)))

    def add_bad(self, why: str) -> None:
        """Count a row as bad that was counted as a row."""
        self.add(Lengths(rows=-1, bad=1, bad_first=(why,)))

    def add(self, later: "Lengths") -> None:
        """Count what became of the rows that follow."""
        for name in (item.name for item in fields(self) if item.type is int):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.first_long = self.first_long or later.first_long
        self.special_first = self.special_first or later.special_first
        self.bad_first = (self.bad_first + later.bad_first)[:SHOWN]
        if later.longest and (self.longest is None or later.longest[0] > self.longest[0]):
            self.longest = later.longest


def encode(
    rows: list[Row], section: DataSection, tokenizer: Any, template: ChatTemplate | None, virtual: int = 0
) -> tuple[Examples, Lengths]:
    """Few rows, all at once: `encode_chunk` of each chunk, and `check`."""
    counts, parts = Lengths(), []
    for chunk in chunked(iter(rows)):
        examples, lengths = encode_chunk(chunk, section, tokenizer, template, virtual)
        counts.add(lengths)
        refuse_bad(lengths, section)
        parts += [examples.read(index) for index in range(len(examples))]
    check(counts, section, virtual)
    return join(parts), counts


def encode_chunk(
    rows: list[Row], section: DataSection, tokenizer: Any, template: ChatTemplate | None, virtual: int = 0
) -> tuple[Examples, Lengths]:
    """The rows as tokens, at most section.max_length each, less the `virtual` tokens that will stand before them.

    template: of conversations; None for plain texts. Plain texts begin as the tokenizer begins a text (with its bos
    token, if it adds one), end with its eos token, and are supervised throughout.

    Bad rows are counted; `refuse_bad` is for the caller.

    Raises:
        DataError: a template fails.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("the tokenizer gives no character offsets; a fast one (with a tokenizer.json) is needed")
    counts, parts = Lengths(rows=len(rows)), []
    encoded: Iterator[_Example | None] = (
        _texts(rows, section, tokenizer) if template is None else _chats(rows, section, tokenizer, template, counts)
    )
    for row, example in zip(rows, encoded, strict=True):
        if example is not None:
            parts += _fit(example, section, section.max_length - virtual, row.where, counts)
    return join(parts), counts


def chunked(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Lists of CHUNK rows, or of fewer that are long."""
    while chunk := some(rows, CHUNK, CHARACTERS):
        yield chunk


def some(rows: Iterator[Row], count: int, characters: int) -> list[Row]:
    """The next `count` rows, or fewer of at least so many characters."""
    found: list[Row] = []
    while len(found) < count and characters > 0 and (row := next(rows, None)) is not None:
        found.append(row)
        characters -= len(row.text or "") + sum(len(message["content"] or "") for message in row.messages or ())
    return found


class _Example(NamedTuple):
    tokens: np.ndarray
    supervised: np.ndarray
    whole: bool  # False: the text goes on, far beyond max_length


def _texts(rows: list[Row], section: DataSection, tokenizer: Any) -> Iterator[_Example]:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos token, with which each text of data.format: text ends")
    limit = None if section.too_long == "split" else section.max_length
    for ids, _, whole in _tokenise(tokenizer, [row.text or "" for row in rows], limit):
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        mask: np.ndarray = np.ones(len(ids), bool)
        mask[0] = False
        yield _Example(np.asarray(ids, np.int32), mask, whole)


def _chats(
    rows: list[Row], section: DataSection, tokenizer: Any, template: ChatTemplate, counts: Lengths
) -> Iterator[_Example | None]:
    """Each row's tokens; None of a bad row."""
    special = special_tokens(tokenizer)
    turns = None if section.train_on_prompt else partial(learnt_turns, section=section)
    answers = list(template.render(rows, turns))
    texts = [answer["text"] for answer in answers]
    batch = _tokenise(tokenizer, texts, section.max_length, add_special_tokens=False)
    for row, answer, (ids, offsets, whole) in zip(rows, answers, batch, strict=True):
        try:
            spans = _spans(row, answer, special, section)
        except BadBeginning as error:
            counts.add_bad(str(error))
            yield None
            continue
        characters = np.asarray(offsets, np.int64).reshape(-1, 2)
        found = next(filter(None, (special.search(said["content"]) for said in row.messages or ())), None)
        if found:
            counts.add(Lengths(special=1, special_first=f"{row.where} ({found.group()})"))
        counts.shared_starts += shared_starts(characters, spans)
        mask = token_mask(characters, spans)
        mask[:1] = False
        yield _Example(np.asarray(ids, np.int32), mask, whole)


def _spans(row: Row, answer: dict[str, Any], special: re.Pattern[str], section: DataSection) -> list[Span]:
    """Where the loss is, in characters of the text."""
    if "refused" in answer:
        raise BadBeginning(row.where, answer["refused"])
    if section.train_on_prompt:
        _check_all_learnt(row)
        return [(0, len(answer["text"]))]
    return supervised_spans(row.where, row.messages or [], answer, special, section)


def _check_all_learnt(row: Row) -> None:
    for number, message in enumerate(row.messages or ()):
        if not message.get("train", True):
            raise DataError(
                f"{row.where}: message {number} (counted from 0) is not to be learnt, but data.train_on_prompt learns "
                "every token; keep one"
            )


def _tokenise(
    tokenizer: Any, texts: list[str], max_length: int | None, **options
) -> Iterator[tuple[list[int], list[tuple[int, int]], bool]]:
    """(tokens, their characters, whether that is all) of each text.

    Of a text that is far too long for max_length only the beginning is tokenised: a tokenizer may take minutes for a
    line of 64 MB.
    """
    limit = sys.maxsize if max_length is None else _CHARACTERS * max_length
    # verbose: no warning that a text is longer than the model's context; data.max_length is ours to check.
    options |= {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    options |= {"return_offsets_mapping": True}
    batch = tokenizer([text[:limit] for text in texts], **options)
    for text, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
        whole = len(text) <= limit
        if not whole and len(ids) <= limit // _CHARACTERS + _MARGIN:
            one = tokenizer(text, **options)
            ids, offsets, whole = one["input_ids"], one["offset_mapping"], True
        yield ids, offsets, whole


def _fit(
    example: _Example, section: DataSection, room: int, where: str, counts: Lengths
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The example as it will be trained on, at most `room` tokens: whole, cut, in pieces, or not at all; counted."""
    tokens, mask, whole = example
    if whole and not mask.any():
        counts.dropped_silent += 1
        return []
    if len(tokens) <= room:
        return [(tokens, mask)]
    if section.too_long == "split":
        counts.split += 1
        return _pieces(tokens, room)
    counts.add_long(len(tokens), f"{where}{'' if whole else ', at least'}")
    tokens, mask = tokens[:room].copy(), mask[:room].copy()
    if section.too_long != "truncate":
        counts.dropped_long += 1
    elif not mask.any():
        counts.dropped_cut += 1
    else:
        counts.truncated += 1
        return [(tokens, mask)]
    return []


def _pieces(tokens: np.ndarray, room: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A text in pieces, each supervised but for its first token."""
    _, offsets, lengths = split(np.array([len(tokens)]), room)
    return [(tokens[at : at + length], np.arange(length) > 0) for at, length in zip(offsets, lengths)]


def refuse_bad(counts: Lengths, source: SourceSection) -> None:
    """Raise DataError of the first bad row, unless the source has such rows skipped."""
    if counts.bad and source.on_bad_line == "error":
        raise DataError(counts.bad_first[0])


def refuse_long(counts: Lengths, section: DataSection, virtual: int) -> None:
    """Raise DataError of rows that are too long under too_long: error."""
    if counts.first_long and counts.longest and section.too_long == "error":
        (first, where), (longest, there) = counts.first_long, counts.longest
        ways = f"truncate{', split' * section.only_texts} or drop"
        todo = f"raise data.max_length, or set data.too_long to {ways}"
        if section.streaming:
            todo = f"set data.too_long to {ways}, with which a run goes on, or raise data.max_length for a new one"
        raise DataError(
            f"{counts.too_long} of {counts.rows} rows{' of a block' * section.streaming} are longer than "
            f"{_limit(section, virtual)}, the first {where}: {first} tokens, the longest {there}: {longest}; {todo}"
        )


def check(counts: Lengths, section: DataSection, virtual: int) -> None:
    """Whether what became of all rows of a source is what the user can want.

    Raises:
        DataError: of refuse_long, or no token at all is supervised.
    """
    refuse_long(counts, section, virtual)
    if counts.dropped == counts.rows:
        raise DataError(f"no supervised token in {counts.rows} rows: {nothing_left(counts, section, virtual)}")


def nothing_left(counts: Lengths, section: DataSection, virtual: int) -> str:
    """Why all rows were dropped, and what to do."""
    limit = _limit(section, virtual)
    reasons = {
        "have no assistant turn that is learnt": counts.dropped_silent,
        f"are longer than {limit}": counts.dropped_long,
        f"have nothing supervised within {limit}": counts.dropped_cut,
    }
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    todo = "; raise data.max_length" if counts.dropped_long or counts.dropped_cut else ""
    return f"{why}; there is nothing to learn from{todo}"


def _limit(section: DataSection, virtual: int) -> str:
    return f"data.max_length {section.max_length}" + (f" less {virtual} virtual tokens" if virtual else "")
