"""Records to rows: what the columns of alpaca, sharegpt, messages and text mean.

Templates and tokens come later, in chat.py.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from jaxtune.config import DATA_COLUMNS, Columns, SourceSection
from jaxtune.data.packing import shuffled
from jaxtune.data.record import OddRow, Record
from jaxtune.data.sources import read_records
from jaxtune.data.tools import Tool, read_tools
from jaxtune.data.turns import Message, message, read_turns, said_by
from jaxtune.errors import DataError, listing


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation, or one plain text."""

    where: str  # file:line
    messages: list[Message] | None = None
    text: str | None = None
    tools: list[Tool] | None = None  # that the conversation may call


@dataclass
class Rows:
    """All rows of a data set, and what was seen on the way."""

    rows: list[Row] = field(default_factory=list)
    unused: Counter = field(default_factory=Counter)  # column -> in how many rows it stands unread
    empty_answers: int = 0  # assistant turns that say nothing
    odd: list[str] = field(default_factory=list)  # file:line of rows that the dialect leaves out


def read_rows(section: SourceSection, key: str = "data.path") -> Rows:
    """Every row of a source's files, in order. `key` names the setting that lists them.

    Raises:
        DataError: a file, line, column or role is wrong; the message names file, line and column.
    """
    if not section.paths:
        raise DataError(f"{key}: an empty list; give at least one file")
    result = Rows()
    seen: set[str] = set()
    for path in section.paths:
        for where, value in read_records(path):
            seen.update(value)
            _add(result, Record(where, value, section, result.unused))
    _check_optional(section, seen, key)
    if section.num_samples is not None:
        result.rows = _sample(result.rows, section.num_samples)
    for row in result.rows:
        said = [row.messages[at] for at in said_by(row.messages, "assistant")] if row.messages else []
        result.empty_answers += sum(not (turn["content"] or turn.get("tool_calls")) for turn in said)
    return result


def _add(result: Rows, record: Record) -> None:
    section = record.section
    try:
        row = _READERS[section.format](record)
    except OddRow:
        result.odd.append(record.where)
        return
    record.count_unused()
    if row.messages is not None:
        row = replace(row, tools=read_tools(record), messages=_with_system(row.messages, section.system))
    result.rows.append(row)


def _sample(rows: list[Row], count: int) -> list[Row]:
    """`count` of the rows in a random order that is always the same; past all of them, random ones once more."""
    if not rows:
        return []
    chosen: list[int] = []
    while len(chosen) < count:
        chosen += shuffled(len(rows), f"samples {len(chosen)}", 0)[: count - len(chosen)].tolist()
    return [rows[index] for index in chosen]


def _alpaca(record: Record) -> Row:
    if record.like_llamafactory and not isinstance(record.get("output"), str):
        raise OddRow
    asked = record.optional_text("instruction") if record.like_llamafactory else record.text("instruction")
    question = "\n".join(filter(None, (asked, record.optional_text("input"))))
    turns = [*_history(record), (question, record.text("output"))]
    messages = _system(record.optional_text("system"))
    for asked, answered in turns:
        messages += [message("user", asked), message("assistant", answered)]
    return Row(record.where, messages)


def _history(record: Record) -> list[tuple[str, str]]:
    pairs, name = record.get("history"), record.name("history")
    if pairs is None:
        return []
    if not (isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
        raise DataError(f'{record.where}: column "{name}": expected [[question, answer], ...]; found {pairs!r:.60}')
    what = f'column "{name}"'
    return [(record.string(asked, what), record.string(answered, what)) for asked, answered in pairs]


def _sharegpt(record: Record) -> Row:
    return _conversation(record, "conversations")


def _messages(record: Record) -> Row:
    return _conversation(record, "messages")


def _conversation(record: Record, column: str) -> Row:
    messages, system = read_turns(record, column), record.optional_text("system")
    if not system or not said_by(messages, "system"):
        return Row(record.where, _system(system) + messages)
    if record.like_llamafactory:  # there the one among the turns wins
        return Row(record.where, messages)
    name, turns = record.name("system"), record.name(column)
    raise DataError(f'{record.where}: a system prompt in column "{name}" and another among the "{turns}"; keep one')


def _text(record: Record) -> Row:
    return Row(record.where, text=record.text("text"))


_READERS: dict[str, Callable[[Record], Row]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "text": _text,
}


def _system(text: str) -> list[Message]:
    return [message("system", text)] if text else []


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    return messages if system is None or said_by(messages, "system") else [message("system", system), *messages]


def _check_optional(section: SourceSection, seen: Iterable[str], key: str) -> None:
    """A column that is optional, but was named by the user, must stand somewhere."""
    for column in DATA_COLUMNS[section.format]:
        name, default = getattr(section.columns, column), Columns.model_fields[column].default
        if name not in (None, default) and name not in seen:
            raise DataError(f'{key}: no row has the column "{name}" of data.columns.{column}; found {listing(seen)}')
