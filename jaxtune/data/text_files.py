"""Rows out of text: JSON arrays, JSON lines, and lines that are rows themselves. The bytes may come decompressed."""

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from jaxtune.data.records import CUT_OFF, Bad, Record, as_object, decode, format_of_turns, numbered, without_mark
from jaxtune.data_section import DATA_COLUMNS
from jaxtune.errors import DataError

_AN_ARRAY = "; a JSON array of rows, on one line or several, is a .json file"
_SPACE = re.compile(r"[ \t\n\r]*")  # what JSON calls white space, and nothing more


def read_plain(file: BinaryIO, path: str, bad: Bad) -> Iterator[Record]:
    """Each line that is not blank as {"text": line}, without its end."""
    for number, raw in numbered(file, path):
        try:
            text = decode(raw, path, number).rstrip("\r\n")
        except DataError as error:
            bad(error)
            continue
        if text.strip():
            yield f"{path}:{number}", {"text": text}


def read_lines(file: BinaryIO, path: str, bad: Bad) -> Iterator[Record]:
    """JSON lines: one object a line; blank lines are skipped."""
    for number, raw in numbered(file, path):
        try:
            record = read_line(raw, path, number)
        except DataError as error:
            bad(error)
            continue
        if record is not None:
            yield record


def read_line(raw: bytes, path: str, number: int) -> Record | None:
    """The object on line `number` of a .jsonl file; None of a blank line.

    Raises:
        DataError: the line is something else.
    """
    text, where = decode(raw, path, number), f"{path}:{number}"
    if not text.strip():
        return None
    value = _parse_line(text, where, torn=not raw.endswith(b"\n"))
    return where, as_object(value, where, _inside(value))


def _inside(value: Any) -> str:
    """A word on a line that is a list of objects: turns, or rows."""
    format = format_of_turns(value)
    if format:
        return f'; a list of turns is a column of a row: {{"{DATA_COLUMNS[format][0]}": [...]}}'
    return _AN_ARRAY if isinstance(value, list) and value and isinstance(value[0], dict) else ""


def _parse_line(text: str, where: str, torn: bool) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = CUT_OFF if torn and _cut(error) else _comma(error)
        if text.lstrip().startswith("["):
            hint = _AN_ARRAY
        raise DataError(f"{where}: not valid JSON: {error.msg} (column {error.colno}){hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None


def read_array(file: BinaryIO, path: str, bad: Bad) -> Iterator[Record]:
    """A JSON array of objects, which is read whole. After broken JSON nobody can tell where the next row begins, so
    that is always an error; an element that is no object is a bad row.
    """
    text = decode(without_mark(file.read(), path), path, 1)
    try:
        yield from _array_items(text, path, bad)
    except json.JSONDecodeError as error:
        hint = CUT_OFF if _cut(error) else _comma(error)
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}){hint}") from None


def _cut(error: json.JSONDecodeError) -> bool:
    """Whether the text ends where more of a value has to follow."""
    rest = error.doc[error.pos :].rstrip()
    return error.msg.startswith("Unterminated") or any(word.startswith(rest) for word in ("true", "false", "null"))


def _comma(error: json.JSONDecodeError) -> str:
    """A word on the comma after the last element, which other languages allow."""
    before, here = error.doc[: error.pos].rstrip()[-1:], error.doc[error.pos : error.pos + 1]
    return f"; JSON has no comma before a {here}: take it out" if before == "," and here in ("]", "}") else ""


def _array_items(text: str, path: str, bad: Bad) -> Iterator[Record]:
    """One element after another, because json.loads would not tell where each begins."""
    position = _skip(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        found = _object(text, position) if text[position] == "{" else f"{text[position]!r}"
        raise DataError(f"{path}: expected an array of objects, [{{...}}, ...], found {found}")
    position = _skip(text, position + 1)
    more, line, counted, row = text[position : position + 1] != "]", 1, 0, 0
    while more:
        line, counted, row = line + text.count("\n", counted, position), position, row + 1
        where = f"{path}:{line} (row {row})"
        value, position = _parse_item(text, position, where)
        try:
            record = where, as_object(value, where)
        except DataError as error:
            bad(error)
        else:
            yield record
        position = _skip(text, position)
        more = text[position : position + 1] == ","
        if more:
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    if _skip(text, position + 1) != len(text):
        raise json.JSONDecodeError("Extra data after the array", text, _skip(text, position + 1))


def _object(text: str, position: int) -> str:
    """What an object in the array's stead is, in words."""
    try:
        value, end = _decode_item(text, position)
    except (ValueError, RecursionError):
        value, end = {}, position
    if _skip(text, end) == len(text):
        inside = next((name for name, it in value.items() if isinstance(it, list)), None)
        return "one object" + (
            "" if inside is None else f'; if the list in its "{inside}" is the rows, keep that alone'
        )
    return "an object; one object a line is a .jsonl file"


_decode_item = json.JSONDecoder().raw_decode


def _parse_item(text: str, position: int, where: str) -> tuple[Any, int]:
    try:
        return _decode_item(text, position)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None


def _skip(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches the empty string
