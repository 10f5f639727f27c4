"""Records to rows: what the columns of alpaca, sharegpt, messages and text mean.

Templates and tokens come later, in chat.py.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxtune.config import DATA_COLUMNS, Columns, SourceSection
from jaxtune.data.records import BadRows, refuse
from jaxtune.data.sources import kind, read_records
from jaxtune.errors import DataError, listing

Message = dict[str, str]  # role (system, user, assistant) and content

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_OPENAI_ROLES = {role: role for role in ("system", "user", "assistant")}
_CHANGES_MEANING = ("tool_calls", "function_call", "weight")


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation, or one plain text."""

    where: str  # file:line
    messages: list[Message] | None = None
    text: str | None = None


@dataclass
class Rows:
    """All rows of a data set, and what was seen on the way."""

    rows: list[Row] = field(default_factory=list)
    unused: Counter = field(default_factory=Counter)  # column -> in how many rows it stands unread
    empty_answers: int = 0  # assistant turns without text
    bad: int = 0  # how many were left out, under on_bad_line: skip
    bad_first: list[str] = field(default_factory=list)  # what is wrong with the first few of them


def read_rows(section: SourceSection, key: str = "data.path") -> Rows:
    """Every row of a source's files, in order, all at once; see `stream_rows`."""
    result = Rows()
    result.rows.extend(stream_rows(section, result, key))
    return result


def stream_rows(section: SourceSection, seen: Rows, key: str = "data.path") -> Iterator[Row]:
    """Every row of a source's files, in order, as they are read. `key` names the setting that lists them.

    seen: takes what is seen on the way, but not the rows.

    section: its path names files, each of them; sources.with_files makes such a one.

    Raises:
        DataError: a file, line, column or role is wrong; the message names file, line and column.
    """
    if not section.paths:
        raise DataError(f"{key}: an empty list; give at least one file")
    left_out = BadRows()
    bad = left_out.add if section.on_bad_line == "skip" else refuse
    columns: set[str] = set()
    read, good = _READERS[section.format], 0
    for path in section.paths:
        for where, value in read_records(path, bad):
            record = _Record(where, value, section.columns, seen.unused)
            try:
                row = read(record)
            except DataError as error:
                bad(error)
                continue
            record.count_unused(section.format)
            columns.update(value)
            seen.empty_answers += sum(m["role"] == "assistant" and not m["content"] for m in row.messages or ())
            good += 1
            yield _with_system(row, section.system)
    left_out.check(good, key)
    seen.bad, seen.bad_first = left_out.count, left_out.first
    _check_optional(section, columns, key)


@dataclass
class _Record:
    """One object, with the errors that a wrong column gives."""

    where: str
    value: dict[str, Any]
    columns: Columns
    unused: Counter

    def get(self, column: str) -> Any:
        """The value in a column that may be absent."""
        name = getattr(self.columns, column)
        return None if name is None else self.value.get(name)

    def need(self, column: str) -> Any:
        name = getattr(self.columns, column)
        if name not in self.value:
            found = f"found {listing(self.value)}" if self.value else "the object is empty"
            raise DataError(f'{self.where}: no column "{name}"; {found}; set data.columns.{column}')
        return self.value[name]

    def text(self, column: str) -> str:
        return self.string(self.need(column), f'column "{getattr(self.columns, column)}"')

    def optional_text(self, column: str) -> str:
        """The text in a column that may be absent or null: empty then."""
        value = self.get(column)
        return "" if value is None else self.string(value, f'column "{getattr(self.columns, column)}"')

    def string(self, value: Any, what: str) -> str:
        if not isinstance(value, str):
            raise DataError(f"{self.where}: {what} is {kind(value)}; expected a string; found {value!r:.60}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            bad = value[error.start].encode("unicode_escape").decode()
            raise DataError(f"{self.where}: {what} holds {bad}, half of a surrogate pair, which is no text") from None
        return value

    def messages(self, column: str) -> list[Any]:
        value, name = self.need(column), getattr(self.columns, column)
        if not isinstance(value, list):
            raise DataError(f'{self.where}: column "{name}" is {kind(value)}; expected a list of messages')
        if not value:
            raise DataError(f'{self.where}: column "{name}" is an empty list; expected at least one message')
        return value

    def count_unused(self, format: str) -> None:
        read = {getattr(self.columns, column) for column in DATA_COLUMNS[format]}
        self.unused.update(name for name in self.value if name not in read)


def _alpaca(record: _Record) -> Row:
    question = "\n".join(filter(None, (record.text("instruction"), record.optional_text("input"))))
    turns = [*_history(record), (question, record.text("output"))]
    messages = _system(record.optional_text("system"))
    for asked, answered in turns:
        messages += [_message("user", asked), _message("assistant", answered)]
    return Row(record.where, messages)


def _history(record: _Record) -> list[tuple[str, str]]:
    pairs, name = record.get("history"), record.columns.history
    if pairs is None:
        return []
    if not (isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
        raise DataError(f'{record.where}: column "{name}": expected [[question, answer], ...]; found {pairs!r:.60}')
    what = f'column "{name}"'
    return [(record.string(asked, what), record.string(answered, what)) for asked, answered in pairs]


def _sharegpt(record: _Record) -> Row:
    messages = _turns(record, "conversations", "from", "value", _SHAREGPT_ROLES)
    system = record.optional_text("system")
    if system and any(message["role"] == "system" for message in messages):
        name, turns = record.columns.system, record.columns.conversations
        raise DataError(f'{record.where}: a system prompt in column "{name}" and another among the "{turns}"; keep one')
    return Row(record.where, _system(system) + messages)


def _messages(record: _Record) -> Row:
    return Row(record.where, _turns(record, "messages", "role", "content", _OPENAI_ROLES))


def _text(record: _Record) -> Row:
    return Row(record.where, text=record.text("text"))


_READERS: dict[str, Callable[[_Record], Row]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "text": _text,
}


def _turns(record: _Record, column: str, role_key: str, text_key: str, roles: dict[str, str]) -> list[Message]:
    messages, name = [], getattr(record.columns, column)
    for number, turn in enumerate(record.messages(column)):
        what = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise DataError(f"{record.where}: {what} is {kind(turn)}; expected an object with {role_key}, {text_key}")
        for key in (role_key, text_key):
            if key not in turn:
                raise DataError(f'{record.where}: {what} has no "{key}"; found {listing(turn) or "nothing"}')
        role = turn[role_key]
        if not isinstance(role, str) or role not in roles:
            raise DataError(f"{record.where}: {what}: unknown role {role!r:.40}; allowed: {listing(roles)}")
        _check_extras(record, turn, (role_key, text_key), what, name)
        messages.append(_message(roles[role], record.string(turn[text_key], f"{what}.{text_key}")))
    return messages


def _check_extras(record: _Record, turn: dict, read: tuple[str, str], what: str, name: str) -> None:
    """Keys of a turn that nobody reads are counted; those that would change what is learnt are refused."""
    for key, value in turn.items():
        if key in read or value is None:
            continue
        if key in _CHANGES_MEANING and value not in ([], 1):
            raise DataError(f'{record.where}: {what} has "{key}", which is not supported; take it out of the data')
        record.unused[f"{name}[].{key}"] += 1


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _system(text: str) -> list[Message]:
    return [_message("system", text)] if text else []


def _with_system(row: Row, system: str | None) -> Row:
    if system is None or row.messages is None or any(message["role"] == "system" for message in row.messages):
        return row
    return Row(row.where, [_message("system", system), *row.messages])


def _check_optional(section: SourceSection, seen: Iterable[str], key: str) -> None:
    """A column that is optional, but was named by the user, must stand somewhere."""
    for column in DATA_COLUMNS[section.format]:
        name, default = getattr(section.columns, column), Columns.model_fields[column].default
        if name not in (None, default) and name not in seen:
            raise DataError(f'{key}: no row has the column "{name}" of data.columns.{column}; found {listing(seen)}')
