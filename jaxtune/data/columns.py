"""One object of a data file, and the errors that its columns give. What the columns mean is for formats and turns."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from jaxtune.data.records import format_of_turns, kind
from jaxtune.data_section import DATA_COLUMNS, SourceSection
from jaxtune.errors import DataError, listing, nearest


class OddRow(Exception):
    """A row that LLaMA-Factory would leave out; only with `dialect: llamafactory`."""


def fitting_format(value: dict[str, Any]) -> tuple[str, str] | None:
    """The format that could read an object, and the column that its first one is; None: it is not plain."""
    for name, held in value.items():
        format = format_of_turns(held)
        if format:
            return format, name
    if value.keys() >= {"instruction", "output"}:
        return "alpaca", "instruction"
    return ("text", "text") if isinstance(value.get("text"), str) else None


def in_words(format: str, column: str) -> str:
    """The settings that read a format, as they stand in a configuration. column: what its first one is called."""
    own = DATA_COLUMNS[format][0]
    return f"data.format: {format}" + (f" with data.columns.{own}: {column}" if column != own else "")


@dataclass
class Cells:
    """An object, and the section that says how it is read."""

    where: str
    value: dict[str, Any]
    section: SourceSection
    unused: Counter
    of_table: bool = False  # whose structs have the keys of all rows, null where a row has none

    @property
    def like_llamafactory(self) -> bool:
        return self.section.dialect == "llamafactory"

    def name(self, column: str) -> Any:
        """What the data call a column; None: it is absent."""
        return getattr(self.section.columns, column)

    def get(self, column: str) -> Any:
        """The value in a column that may be absent."""
        name = self.name(column)
        return None if name is None else self.value.get(name)

    def need(self, column: str) -> Any:
        name = self.name(column)
        if name not in self.value:
            found = f"found {listing(self.value)}" if self.value else "the object is empty"
            raise DataError(f'{self.where}: no column "{name}"; {found}{self._advice(column)}')
        return self.value[name]

    def _advice(self, column: str) -> str:
        """What to do about a column that is not there."""
        if self.like_llamafactory:
            return "; the columns of its entry in dataset_info.json name it"
        turns = [name for name, held in self.value.items() if format_of_turns(held)]
        if len(turns) > 1:  # of TRL's prompt and completion neither is the conversation, of chosen and rejected each
            return f"; {listing(turns)} hold turns each: write the whole conversation into one column"
        fitting = fitting_format(self.value)
        if fitting and fitting[0] != self.section.format:
            return f"; {in_words(*fitting)} would fit these columns"
        read = {self.name(other) for other in DATA_COLUMNS[self.section.format]}
        close = nearest(self.name(column), self.value.keys() - read)
        return f"{close} Rename it, or set data.columns.{column}" if close else f"; set data.columns.{column}"

    def text(self, column: str) -> str:
        return self.string(self.need(column), f'column "{self.name(column)}"')

    def optional_text(self, column: str) -> str:
        """The text in a column that may be absent or null: empty then."""
        value = self.get(column)
        return "" if value is None else self.string(value, f'column "{self.name(column)}"')

    def string(self, value: Any, what: str) -> str:
        if not isinstance(value, str):
            raise DataError(f"{self.where}: {what} is {kind(value)}; expected a string; found {value!r:.60}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            bad = value[error.start].encode("unicode_escape").decode()
            raise DataError(f"{self.where}: {what} holds {bad}, half of a surrogate pair, which is no text") from None
        return value

    def as_json(self, value: Any, what: str) -> Any:
        """A value that a template can write down as JSON: a table's dates and bytes are none."""
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{self.where}: {what} is nothing that JSON has: {error}; found {value!r:.60}") from None
        self.string(text, what)
        return value

    def identity(self, value: Any, what: str) -> str:
        """The text of an id, which some write as a number, and pandas as 1.0."""
        if type(value) is float and value.is_integer():
            value = int(value)
        return str(value) if type(value) is int else self.string(value, what)

    def given(self, value: Any) -> Any:
        """A value as the row has it: of a table's structs without the keys that are null."""
        if not self.of_table:
            return value
        if isinstance(value, dict):
            return {key: self.given(inner) for key, inner in value.items() if inner is not None}
        return [self.given(inner) for inner in value] if isinstance(value, list) else value

    def messages(self, column: str) -> list[Any]:
        value, name = self.need(column), self.name(column)
        if not isinstance(value, list):
            raise DataError(f'{self.where}: column "{name}" is {kind(value)}; expected a list of messages')
        if not value and self.like_llamafactory:
            raise OddRow
        if not value:
            raise DataError(f'{self.where}: column "{name}" is an empty list; expected at least one message')
        return value

    def check_without(self) -> None:
        """Whether the columns that must hold nothing do."""
        for name in self.section.without:
            value = self.value.get(name)
            if any(value) if isinstance(value, list) else value:
                raise DataError(
                    f'{self.where}: column "{name}" holds {value!r:.60}, and only text can be learnt from here; take '
                    "such rows out"
                )

    def count_unused(self) -> None:
        read = {self.name(column) for column in DATA_COLUMNS[self.section.format]} | {*self.section.without}
        self.unused.update(name for name in self.value if name not in read)
