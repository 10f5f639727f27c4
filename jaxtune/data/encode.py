"""Rows to tokens: templates applied, tokenised in batches, cut to length, counted.

The result is three flat arrays, whatever the number of rows.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import TEXTS, DataSection
from jaxtune.data.chat import shared_starts, special_tokens, supervised_spans, token_mask
from jaxtune.data.formats import Row
from jaxtune.data.pieces import split
from jaxtune.data.template import ChatTemplate
from jaxtune.errors import DataError

_CHUNK = 512  # rows that the tokenizer gets at once
_CHARACTERS = 64  # of a text, for each token of max_length; what lies beyond is not tokenised
_MARGIN = 64  # tokens near the cut, which may not be those of the whole text


@dataclass(frozen=True)
class Examples:
    """Conversations as tokens, end to end. The first token of each is never supervised: nothing comes before it."""

    tokens: np.ndarray  # int32 [all tokens]
    supervised: np.ndarray  # bool [all tokens]
    starts: np.ndarray  # int64 [examples + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [examples]"""
        return np.diff(self.starts)

    @property
    def num_supervised(self) -> int:
        return int(np.count_nonzero(self.supervised))

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, which of them are supervised)"""
        part = slice(self.starts[index], self.starts[index + 1])
        return self.tokens[part], self.supervised[part]

    def add_to(self, digest: Any) -> None:
        """Hash all that the examples are made of."""
        for array, kind in ((self.starts, "<i8"), (self.tokens, "<i4")):
            digest.update(array.astype(kind, copy=False).tobytes())
        digest.update(np.packbits(self.supervised).tobytes())

    def take(self, indices: np.ndarray) -> "Examples":
        """Only these examples, in this order."""
        return join([self.example(i) for i in indices])


def join(parts: list[tuple[np.ndarray, np.ndarray]]) -> Examples:
    """Examples out of the (tokens, supervised) of each."""
    starts = np.concatenate(([0], np.cumsum([len(tokens) for tokens, _ in parts], dtype=np.int64)))
    tokens = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in parts)])
    return Examples(tokens, np.concatenate([np.zeros(0, bool), *(mask for _, mask in parts)]), starts.astype(np.int64))


@dataclass
class Lengths:
    """What became of the rows. Those that are not dropped are the examples."""

    rows: int = 0
    too_long: list[tuple[int, str]] = field(default_factory=list)  # (tokens, file:line), whatever was done with them
    dropped_long: int = 0  # longer than max_length
    dropped_cut: int = 0  # truncated until nothing supervised was left
    dropped_silent: int = 0  # without a supervised token from the start
    truncated: int = 0  # and kept
    split: int = 0  # into pieces, all of which are kept
    shared_starts: int = 0  # assistant turns whose first token is also the prompt's last

    @property
    def dropped(self) -> int:
        return self.dropped_long + self.dropped_cut + self.dropped_silent


def encode(
    rows: list[Row], section: DataSection, tokenizer: Any, template: ChatTemplate | None, virtual: int = 0
) -> tuple[Examples, Lengths]:
    """The rows as tokens, at most section.max_length each, less the `virtual` tokens that will stand before them.

    template: of conversations; None for plain texts. Plain texts begin as the tokenizer begins a text (with its bos
    token, if it adds one), end with its eos token, and are supervised throughout.

    Raises:
        DataError: a template fails, a row is too long under too_long: error, or no token at all is supervised.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("the tokenizer gives no character offsets; a fast one (with a tokenizer.json) is needed")
    counts, parts = Lengths(rows=len(rows)), []
    encoded = (
        _texts(rows, section, tokenizer) if template is None else _chats(rows, section, tokenizer, template, counts)
    )
    for row, example in zip(rows, encoded, strict=True):
        parts += _fit(example, section, section.max_length - virtual, row.where, counts)
    check_lengths(counts, section, virtual, bool(parts))
    return join(parts), counts


class _Example(NamedTuple):
    tokens: np.ndarray
    supervised: np.ndarray
    whole: bool  # False: the text goes on, far beyond max_length


def _texts(rows: list[Row], section: DataSection, tokenizer: Any) -> Iterator[_Example]:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos token, with which each text of data.format: text ends")
    limit = None if section.too_long == "split" else section.max_length
    for chunk in _chunked(iter(rows)):
        for ids, _, whole in _tokenise(tokenizer, [row.text or "" for row in chunk], limit):
            if ids[-1:] != [tokenizer.eos_token_id]:
                ids.append(tokenizer.eos_token_id)
            mask: np.ndarray = np.ones(len(ids), bool)
            mask[0] = False
            yield _Example(np.asarray(ids, np.int32), mask, whole)


def _chats(
    rows: list[Row], section: DataSection, tokenizer: Any, template: ChatTemplate, counts: Lengths
) -> Iterator[_Example]:
    special = special_tokens(tokenizer)
    answers = template.render(((row.where, row.messages or []) for row in rows), marks=not section.train_on_prompt)
    for chunk in _chunked(zip(rows, answers)):
        texts = [answer["text"] for _, answer in chunk]
        batch = _tokenise(tokenizer, texts, section.max_length, add_special_tokens=False)
        for (row, answer), (ids, offsets, whole) in zip(chunk, batch, strict=True):
            if section.train_on_prompt:
                spans = [(0, len(answer["text"]))]
            else:
                spans = supervised_spans(row.where, row.messages, answer, special)
            characters = np.asarray(offsets, np.int64).reshape(-1, 2)
            counts.shared_starts += shared_starts(characters, spans)
            mask = token_mask(characters, spans)
            mask[:1] = False
            yield _Example(np.asarray(ids, np.int32), mask, whole)


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


def _chunked(items: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(islice(items, _CHUNK)):
        yield chunk


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
    counts.too_long.append((len(tokens), f"{where}{'' if whole else ', at least'}"))
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


def check_lengths(counts: Lengths, section: DataSection, virtual: int, any_left: bool) -> None:
    """Nothing is too long under too_long: error, and something is left to learn from.

    Raises:
        DataError: that is not so; the message says what became of the rows.
    """
    limit = f"data.max_length {section.max_length}" + (f" less {virtual} virtual tokens" if virtual else "")
    if counts.too_long and section.too_long == "error":
        length, where = max(counts.too_long, key=lambda item: item[0])
        raise DataError(
            f"{len(counts.too_long)} of {counts.rows} rows are longer than {limit}, "
            f"the first {counts.too_long[0][1]}: {counts.too_long[0][0]} tokens, the longest {where}: {length}; "
            f"raise data.max_length, or set data.too_long to truncate{', split' * (section.format in TEXTS)} or drop"
        )
    if not any_left:
        raise DataError(
            f"no supervised token in {counts.rows} rows: {counts.dropped_silent} have no assistant turn, "
            f"{counts.dropped_long} are longer than {limit}, "
            f"{counts.dropped_cut} have nothing supervised within it; there is nothing to learn from"
        )
