"""Data files to records: a JSON array or JSON lines, each object with the file and line that it stands on.

What the objects mean is for formats.py.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtune.errors import DataError

Record = tuple[str, dict[str, Any]]  # where it stands ("file:line"), the object

_SPACE = re.compile(r"[ \t\n\r]*")  # what JSON calls white space, and nothing more
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"
_CUT_OFF = "; the file ends in the middle of a value: was it cut off while it was written?"


def read_records(path: str) -> Iterator[Record]:
    """The objects of a .json (one array of objects) or .jsonl (one object a line) file, in order.

    Raises:
        DataError: at the first line that is not what the file's name says; the message names it.
    """
    readers = {".json": _read_array, ".jsonl": _read_lines}
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; allowed: .json (an array of objects), .jsonl (one a line)")
    empty = True
    try:
        for record in reader(path):
            empty = False
            yield record
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if empty:
        raise DataError(f"{path}: empty: there is no row in it")


def _read_lines(path: str) -> Iterator[Record]:
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, 1):
            record = read_line(raw, path, number)
            if record is not None:
                yield record


def read_line(raw: bytes, path: str, number: int) -> Record | None:
    """The object on line `number` of a .jsonl file; None of a blank line.

    Raises:
        DataError: the line is something else.
    """
    text, where = _decode(raw, path, number), f"{path}:{number}"
    return (where, _object(_parse_line(text, where, torn=not raw.endswith(b"\n")), where)) if text.strip() else None


def _parse_line(text: str, where: str, torn: bool) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = _CUT_OFF if torn else ""
        if text.lstrip().startswith("["):
            hint = "; a JSON array over several lines is a .json file"
        raise DataError(f"{where}: not valid JSON: {error.msg} (column {error.colno}){hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None


def _read_array(path: str) -> Iterator[Record]:
    text = _decode(Path(path).read_bytes(), path, 1)
    try:
        yield from _array_items(text, path)
    except json.JSONDecodeError as error:
        hint = _CUT_OFF if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated") else ""
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}){hint}") from None


def _array_items(text: str, path: str) -> Iterator[Record]:
    """One element after another, because json.loads would not tell where each begins."""
    position = _skip(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        found = "an object; one object a line is a .jsonl file" if text[position] == "{" else f"{text[position]!r}"
        raise DataError(f"{path}: expected an array of objects, found {found}")
    position = _skip(text, position + 1)
    more, line, counted, row = text[position : position + 1] != "]", 1, 0, 0
    while more:
        line, counted, row = line + text.count("\n", counted, position), position, row + 1
        where = f"{path}:{line} (row {row})"
        value, position = _parse_item(text, position, where)
        yield where, _object(value, where)
        position = _skip(text, position)
        more = text[position : position + 1] == ","
        if more:
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    if _skip(text, position + 1) != len(text):
        raise json.JSONDecodeError("Extra data after the array", text, _skip(text, position + 1))


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


def _decode(raw: bytes, path: str, line: int) -> str:
    """The text of `raw`, which begins at `line`."""
    if line == 1:
        if raw.startswith(_UTF16):
            raise DataError(f"{path}: UTF-16 text; save it as UTF-8")
        raw = raw.removeprefix(_BOM)
    nul = raw.find(b"\0")
    if nul >= 0:
        line += raw.count(b"\n", 0, nul)
        raise DataError(f"{path}:{line}: a NUL byte; is the file damaged, or not text at all?")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        bad = raw[error.start : error.start + 4].hex(" ")
        raise DataError(f"{path}:{line}: not UTF-8 text (bytes {bad}); save the file as UTF-8") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with columns, found {kind(value)}")
    return value


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names[type(value)]
