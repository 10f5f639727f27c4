"""Rows to tokens: templates applied, tokenised in batches, cut to length, counted.

The result is three flat arrays, whatever the number of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import DataSection
from jaxtune.data.chat import learnt_turns, shared_starts, special_tokens, supervised_spans, token_mask
from jaxtune.data.formats import Row
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

    def take(self, indices: np.ndarray) -> "Examples":
        """Only these examples, in this order."""
        parts = [slice(self.starts[i], self.starts[i + 1]) for i in indices]
        return join([(self.tokens[part], self.supervised[part]) for part in parts])


def join(parts: list[tuple[np.ndarray, np.ndarray]]) -> Examples:
    """Examples out of the (tokens, supervised) of each."""
    starts = np.concatenate(([0], np.cumsum([len(tokens) for tokens, _ in parts], dtype=np.int64)))
    tokens = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in parts)])
    return Examples(tokens, np.concatenate([np.zeros(0, bool), *(mask for _, mask in parts)]), starts.astype(np.int64))


def concatenate(parts: list[Examples]) -> Examples:
    """The examples of all parts, one part after another."""
    if len(parts) == 1:
        return parts[0]
    before = np.cumsum([0, *(len(part.tokens) for part in parts)])
    starts = np.concatenate([[0], *(part.starts[1:] + base for part, base in zip(parts, before))])
    tokens, supervised = (np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "supervised"))
    return Examples(tokens, supervised, starts.astype(np.int64))


@dataclass
class Lengths:
    """What became of the rows. Those that are not dropped are the examples."""

    rows: int = 0
    too_long: list[tuple[int, str]] = field(default_factory=list)  # (tokens, file:line), whatever was done with them
    dropped_long: int = 0  # longer than max_length
    dropped_cut: int = 0  # truncated until nothing supervised was left
    dropped_silent: int = 0  # without a supervised token from the start
    truncated: int = 0  # and kept
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
        kept = _fit(example, section, section.max_length - virtual, row.where, counts)
        if kept is not None:
            parts.append(kept)
    _check(counts, section, virtual, bool(parts))
    return join(parts), counts


class _Example(NamedTuple):
    tokens: np.ndarray
    supervised: np.ndarray
    whole: bool  # False: the text goes on, far beyond max_length


def _texts(rows: list[Row], section: DataSection, tokenizer: Any) -> Iterator[_Example]:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos token, with which each text of data.format: text ends")
    for chunk in _chunked(iter(rows)):
        for ids, _, whole in _tokenise(tokenizer, [row.text or "" for row in chunk], section.max_length):
            if ids[-1:] != [tokenizer.eos_token_id]:
                ids.append(tokenizer.eos_token_id)
            mask: np.ndarray = np.ones(len(ids), bool)
            mask[0] = False
            yield _Example(np.asarray(ids, np.int32), mask, whole)


def _chats(
    rows: list[Row], section: DataSection, tokenizer: Any, template: ChatTemplate, counts: Lengths
) -> Iterator[_Example]:
    special = special_tokens(tokenizer)
    turns = None if section.train_on_prompt else partial(learnt_turns, section=section)
    answers = template.render(rows, turns)
    for chunk in _chunked(zip(rows, answers)):
        texts = [answer["text"] for _, answer in chunk]
        batch = _tokenise(tokenizer, texts, section.max_length, add_special_tokens=False)
        for (row, answer), (ids, offsets, whole) in zip(chunk, batch, strict=True):
            if section.train_on_prompt:
                _check_all_learnt(row)
                spans = [(0, len(answer["text"]))]
            else:
                spans = supervised_spans(row.where, row.messages, answer, special, section)
            characters = np.asarray(offsets, np.int64).reshape(-1, 2)
            counts.shared_starts += shared_starts(characters, spans)
            mask = token_mask(characters, spans)
            mask[:1] = False
            yield _Example(np.asarray(ids, np.int32), mask, whole)


def _check_all_learnt(row: Row) -> None:
    for number, message in enumerate(row.messages or ()):
        if not message.get("train", True):
            raise DataError(
                f"{row.where}: message {number} (counted from 0) is not to be learnt, but data.train_on_prompt learns "
                "every token; keep one"
            )


def _tokenise(
    tokenizer: Any, texts: list[str], max_length: int, **options
) -> Iterator[tuple[list[int], list[tuple[int, int]], bool]]:
    """(tokens, their characters, whether that is all) of each text.

    Of a text that is far too long only the beginning is tokenised: a tokenizer may take minutes for a line of 64 MB.
    """
    limit = _CHARACTERS * max_length
    # verbose: no warning that a text is longer than the model's context; data.max_length is ours to check.
    options |= {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    options |= {"return_offsets_mapping": True}
    batch = tokenizer([text[:limit] for text in texts], **options)
    for text, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
        whole = len(text) <= limit
        if not whole and len(ids) <= max_length + _MARGIN:
            one = tokenizer(text, **options)
            ids, offsets, whole = one["input_ids"], one["offset_mapping"], True
        yield ids, offsets, whole


def _chunked(items: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(islice(items, _CHUNK)):
        yield chunk


def _fit(
    example: _Example, section: DataSection, room: int, where: str, counts: Lengths
) -> tuple[np.ndarray, np.ndarray] | None:
    """The example as it will be trained on, at most `room` tokens, or None; counted either way."""
    tokens, mask, whole = example
    if whole and not mask.any():
        counts.dropped_silent += 1
        return None
    if len(tokens) <= room:
        return tokens, mask
    counts.too_long.append((len(tokens), f"{where}{'' if whole else ', at least'}"))
    tokens, mask = tokens[:room].copy(), mask[:room].copy()
    if section.too_long != "truncate":
        counts.dropped_long += 1
    elif not mask.any():
        counts.dropped_cut += 1
    else:
        counts.truncated += 1
        return tokens, mask
    return None


def _check(counts: Lengths, section: DataSection, virtual: int, any_left: bool) -> None:
    limit = f"data.max_length {section.max_length}" + (f" less {virtual} virtual tokens" if virtual else "")
    if counts.too_long and section.too_long == "error":
        length, where = max(counts.too_long, key=lambda item: item[0])
        raise DataError(
            f"{len(counts.too_long)} of {counts.rows} rows are longer than {limit}, "
            f"the first {counts.too_long[0][1]}: {counts.too_long[0][0]} tokens, the longest {where}: {length}; "
            "raise data.max_length, or set data.too_long to truncate or drop"
        )
    if not any_left:
        raise DataError(
            f"no supervised token in {counts.rows} rows: {counts.dropped_silent} have no assistant turn, "
            f"{counts.dropped_long} are longer than {limit}, "
            f"{counts.dropped_cut} have nothing supervised within it; there is nothing to learn from"
        )
