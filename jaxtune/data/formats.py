"""Records to rows: what the columns of alpaca, sharegpt, messages and text mean.

Templates and tokens come later, in chat.py.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from jaxtune.data.columns import Cells, OddRow
from jaxtune.data.packing import shuffled
from jaxtune.data.records import FEW, SHOWN, BadRows, refuse
from jaxtune.data.sources import is_table, read_records
from jaxtune.data.tools import Tool, read_tools
from jaxtune.data.turns import Message, message, read_turns, said_by
from jaxtune.data_section import DATA_COLUMNS, Columns, SourceSection
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
    empty_answers: int = 0  # rows in which the assistant has a turn that says nothing
    empty_first: str = ""  # file:line of the first of them
    bad: int = 0  # how many were left out, under on_bad_line: skip
    bad_first: list[str] = field(default_factory=list)  # what is wrong with the first few of them
    odd: int = 0  # how many the dialect leaves out
    odd_first: str = ""  # file:line of the first of them
    again: int = 0  # how many num_samples asks for past all there are


def read_rows(section: SourceSection, key: str = "data.path") -> Rows:
    """Every row of a source's files, in order, all at once; see `stream_rows`."""
    result = Rows()
    result.rows.extend(stream_rows(section, result, key))
    return result


def stream_rows(section: SourceSection, seen: Rows, key: str = "data.path", block: int = 0) -> Iterator[Row]:
    """Every row of a source's files, in order, as they are read. `key` names the setting that lists them.

    With num_samples all of them are read first, and then come those that are chosen.

    section: its path names files, each of them; locate.with_files makes such a one. seen: takes what is seen on the
    way, but not the rows. block: after each so many rows it is seen whether too many were bad; 0: at the end alone.

    Raises:
        DataError: a file, line, column or role is wrong; the message names file, line and column.
    """
    rows = _read(section, seen, key, block)
    if section.num_samples is not None:
        every = list(rows)
        seen.again = max(0, section.num_samples - len(every))
        rows = _sample(every, section.num_samples)
    for row in rows:
        if any(_says_nothing(said) for said in row.messages or ()):
            seen.empty_answers, seen.empty_first = seen.empty_answers + 1, seen.empty_first or row.where
        yield row


def _says_nothing(said: Message) -> bool:
    """Whether it is an answer without one."""
    return said["role"] == "assistant" and not said["content"].strip() and "tool_calls" not in said


def _read(section: SourceSection, seen: Rows, key: str, block: int) -> Iterator[Row]:
    if not section.paths:
        raise DataError(f"{key}: an empty list; give at least one file")
    left_out = BadRows()

    def leave_out(error: DataError) -> None:
        left_out.add(error)
        seen.bad, seen.bad_first = seen.bad + 1, [*seen.bad_first, str(error)][:SHOWN]
        check_so_far()

    def check_so_far() -> None:
        if block and left_out.count > FEW and (good + left_out.count) % block == 0:
            left_out.check(good, key)

    bad = leave_out if section.on_bad_line == "skip" else refuse
    columns: set[str] = set()
    read, good = _READERS[section.format], 0
    for path in section.paths:
        for where, value in read_records(path, bad):
            record = Cells(where, value, section, seen.unused, is_table(path))
            try:
                record.check_without()
                row = _complete(read(record), record)
            except OddRow:
                seen.odd, seen.odd_first = seen.odd + 1, seen.odd_first or where
                columns.update(value)
                continue
            except DataError as error:
                bad(error)
                continue
            record.count_unused()
            columns.update(value)
            good += 1
            check_so_far()
            yield row
    left_out.check(good, key)
    _check_optional(section, columns, key)


def _complete(row: Row, record: Cells) -> Row:
    """A conversation with its tools, and the source's system prompt if it has none of its own."""
    if row.messages is None:
        return row
    return replace(row, tools=read_tools(record), messages=_with_system(row.messages, record.section.system))


def _sample(rows: list[Row], count: int) -> Iterator[Row]:
    """`count` of the rows in a random order that is always the same; past all of them, random ones once more."""
    for start in range(0, count if rows else 0, max(len(rows), 1)):
        for index in shuffled(len(rows), "samples", start)[: count - start]:
            yield rows[index]


def _alpaca(record: Cells) -> Row:
    if record.like_llamafactory and not isinstance(record.get("output"), str):
        raise OddRow
    asked = record.optional_text("instruction") if record.like_llamafactory else record.text("instruction")
    question = "\n".join(filter(None, (asked, record.optional_text("input"))))
    turns = [*_history(record), (question, record.text("output"))]
    messages = _system(record.optional_text("system"))
    for asked, answered in turns:
        messages += [message("user", asked), message("assistant", answered)]
    return Row(record.where, messages)


def _history(record: Cells) -> list[tuple[str, str]]:
    pairs, name = record.get("history"), record.name("history")
    if pairs is None:
        return []
    if not (isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
        raise DataError(f'{record.where}: column "{name}": expected [[question, answer], ...]; found {pairs!r:.60}')
    what = f'column "{name}"'
    return [(record.string(asked, what), record.string(answered, what)) for asked, answered in pairs]


def _sharegpt(record: Cells) -> Row:
    return _conversation(record, "conversations")


def _messages(record: Cells) -> Row:
    return _conversation(record, "messages")


def _conversation(record: Cells, column: str) -> Row:
    messages, system = read_turns(record, column), record.optional_text("system")
    if not system or not said_by(messages, "system"):
        return Row(record.where, _system(system) + messages)
    if record.like_llamafactory:  # there the one among the turns wins
        return Row(record.where, messages)
    name, turns = record.name("system"), record.name(column)
    raise DataError(f'{record.where}: a system prompt in column "{name}" and another among the "{turns}"; keep one')


def _text(record: Cells) -> Row:
    return Row(record.where, text=record.text("text"))


_READERS: dict[str, Callable[[Cells], Row]] = {
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
