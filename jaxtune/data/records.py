"""What every reader of data files shares: a record and its place, text out of bytes, and what becomes of a bad row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from jaxtune.data_section import TURN_KEYS
from jaxtune.errors import DataError

Record = tuple[str, dict[str, Any]]  # where it stands ("file:line"), the object
Bad = Callable[[DataError], None]  # told of a row that is wrong; when it returns, the reader goes on after that row

FEW, SHARE = 5, 0.001  # so many bad rows, or such a share of all rows, may be skipped
SHOWN = 3  # bad rows that a message names
MAX_LINE = 1 << 30  # bytes
CUT_OFF = "; the file ends in the middle of a value: was it cut off while it was written?"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"


def refuse(error: DataError) -> None:
    """The usual `Bad`: nothing goes on."""
    raise error


@dataclass
class BadRows:
    """The rows that data.on_bad_line: skip leaves out. Which they are follows from the data alone."""

    count: int = 0
    first: list[str] = field(default_factory=list)  # the messages of the first few

    def add(self, error: DataError) -> None:
        """Count one; it is a `Bad`."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(str(error))

    def told(self, good: int) -> str:
        """How many there are beside the good ones, and the first few."""
        more = f"; and {self.count - SHOWN:,} more" if self.count > SHOWN else ""
        return f"{self.count:,} of {good + self.count:,} rows: {'; '.join(self.first)}{more}"

    def check(self, good: int, key: str) -> None:
        """Raise DataError where they are too many beside the good ones: no accident, but a mistake."""
        if not self.count or (good and self.count <= max(FEW, SHARE * (good + self.count))):
            return
        raise DataError(
            f"{key}: too many bad rows, {self.told(good)}; data.on_bad_line: skip leaves out {FEW}, or {SHARE:.1%} of "
            "the rows; mend the data or its settings"
        )


def numbered(file: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
    """(number, line with its end) of each line, counted from 1; the first without its byte order mark.

    Raises:
        DataError: it is UTF-16, or a line has no end.
    """
    lines = iter(lambda: file.readline(MAX_LINE), b"")
    for number, raw in enumerate(lines, 1):
        if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
            raise DataError(f"{path}:{number}: a line of more than {MAX_LINE >> 20} MiB; is it text at all?")
        yield number, without_mark(raw, path) if number == 1 else raw


def without_mark(raw: bytes, path: str) -> bytes:
    """The start of a file without its byte order mark, or DataError for UTF-16."""
    if raw.startswith(_UTF16):
        raise DataError(f"{path}: UTF-16 text; save it as UTF-8")
    return raw.removeprefix(_BOM)


def decode(raw: bytes, path: str, line: int) -> str:
    """The text of `raw`, which begins at `line`."""
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


def as_object(value: Any, where: str, hint: str = "") -> dict[str, Any]:
    """The value itself, or DataError, with the hint, when it is no object."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with columns, found {kind(value)}{hint}")
    return value


def format_of_turns(value: Any) -> str | None:
    """The format whose turns a value has, as far as the keys of the first one tell; None: it is no list of turns."""
    first = value[0] if isinstance(value, list) and value else None
    keys = first.keys() if isinstance(first, dict) else set()
    return next((format for format, needed in TURN_KEYS.items() if keys >= {*needed}), None)


def first_line(error: BaseException) -> str:
    """What a library says, without what follows."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


_KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}


def kind(value: Any) -> str:
    """What a value of a row is, in words."""
    return "null" if value is None else _KINDS.get(type(value), f"of type {type(value).__name__}")
