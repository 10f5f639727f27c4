"""The rows of a source, as they are read, to examples: in this process, or in as many as there are cores.

Rows flow: at no time are more of them in memory than a few chunks.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from jaxtune.config import DataSection
from jaxtune.console import rate_bar
from jaxtune.data.chat import special_tokens
from jaxtune.data.encode import Lengths, check, chunked, encode_chunk, refuse_bad, some
from jaxtune.data.examples import Examples
from jaxtune.data.formats import Row, Rows, stream_rows
from jaxtune.data.records import SHOWN, BadRows
from jaxtune.data.template import ChatTemplate
from jaxtune.data.worker import hello
from jaxtune.data.workers import Workers
from jaxtune.data_section import SourceSection
from jaxtune.errors import listing

MANY = 4096, 1 << 26  # rows, or characters, from which on other processes are started


@dataclass
class Tokenising:
    """A source on its way to examples, and what is seen on the way."""

    source: SourceSection
    key: str  # the setting that lists its files
    section: DataSection
    tokenizer: Any
    template: ChatTemplate | None  # of conversations
    virtual: int = 0  # tokens that will stand before every example
    rows: Rows = field(default_factory=Rows)
    lengths: Lengths = field(default_factory=Lengths)
    spoken: Row | None = None  # the first in which the assistant speaks

    def examples(self, expected: int | None = None) -> Iterator[Examples]:
        """All examples, some at a time. expected: how many rows there are, if that is known.

        Raises:
            DataError: a file, a row, the template or the lengths are wrong, or nothing is left to learn from.
        """
        rows = self._noticed(stream_rows(self.source, self.rows, self.key))
        first = some(rows, *MANY)
        after = some(rows, 1, 1)
        chunks, count = chunked(chain(first, after, rows)), cores()
        if not after:
            yield from self._counted(self._here(chunks), None)
        elif count == 1:
            yield from self._shown(self._here(chunks), expected, "")
        else:
            told = hello(self.section, self.tokenizer, self.template is not None, self.virtual)
            with Workers(count, told) as workers:
                yield from self._shown(workers.encode(chunks), expected, f" with {count} processes")
        bad_rows(self.rows, self.lengths).check(self.lengths.rows, self.key)
        check(self.lengths, self.section, self.virtual)

    def notes(self) -> list[str]:
        """Surprises that the template holds; when all examples were made."""
        return template_notes(self.template, self.section, self.tokenizer, filter(None, [self.spoken]))

    def _noticed(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            if self.spoken is None and _speaks(row):
                self.spoken = row
            yield row

    def _here(self, chunks: Iterator[list[Row]]) -> Iterator[tuple[Examples, Lengths]]:
        for chunk in chunks:
            yield encode_chunk(chunk, self.section, self.tokenizer, self.template, self.virtual)

    def _shown(self, found: Iterator[tuple[Examples, Lengths]], expected: int | None, how: str) -> Iterator[Examples]:
        text = f"Tokenising {listing(self.source.paths, 3)}{how}"
        with rate_bar(text, "rows", expected) as bar:
            yield from self._counted(found, bar)

    def _counted(self, found: Iterator[tuple[Examples, Lengths]], bar: Any) -> Iterator[Examples]:
        for examples, lengths in found:
            refuse_bad(lengths, self.source)
            self.lengths.add(lengths)
            if bar is not None:
                bar(self.lengths.rows)
            yield examples


def template_notes(
    template: ChatTemplate | None, section: DataSection, tokenizer: Any, rows: Iterable[Row]
) -> list[str]:
    """Surprises that a template holds. rows: some, of which the first is tried in which the assistant speaks."""
    if template is None or section.train_on_prompt:
        return []
    spoken, notes = next(filter(_speaks, rows), None), []
    if "strftime_now" in template.source:
        notes.append("The template may write today's date; here it is always 26 July 2024, so that a run can resume.")
    if template.has_marks and spoken:
        answer = next(template.render([spoken]))
        ends = [special_tokens(tokenizer).match(answer["text"], end) for _, end in answer.get("marks", ())]
        if ends and ends[0]:
            notes.append(
                f"The template's {{% generation %}} blocks leave out the {ends[0].group()} that follows them: "
                "the model will not learn to end its turn."
            )
    return notes


def bad_rows(rows: Rows, counts: Lengths) -> BadRows:
    """Those that reading and rendering have left out."""
    return BadRows(rows.bad + counts.bad, [*rows.bad_first, *counts.bad_first][:SHOWN])


def _speaks(row: Row) -> bool:
    """Whether the assistant does."""
    return any(message["role"] == "assistant" for message in row.messages or ())


def cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
