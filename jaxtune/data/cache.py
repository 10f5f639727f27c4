"""Tokens kept on disk: each source's are made once, for all runs and processes that need the same ones.

An entry is a directory whose name is the SHA-256 of all that its tokens depend on. It is built beside its place and
moved there when it is whole, so what a kill leaves is never used. One process builds it; others wait. An entry that
is not as it was written is built again. Nobody deletes old ones: any may be removed at any time, by hand.
"""

import atexit
import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.console import say, warn
from jaxtune.data.encode import Lengths
from jaxtune.data.examples import Examples
from jaxtune.data.formats import Rows
from jaxtune.data.tokenise import Tokenising
from jaxtune.errors import CheckpointError, ConfigError, DataError, listing
from jaxtune.files import expanded, read_json, temporary_directory, try_lock, user_cache
from jaxtune.manifest import damages, sync, write_manifest
from jaxtune.tokenizer import vocabulary_size

FORMAT = 1  # of an entry's files
TOKENS, SUPERVISED, STARTS, COUNTS = "tokens.bin", "supervised.bin", "starts.bin", "counts.json"
PARTIAL, LOCK = ".partial", ".lock"
# Options that the tokens of a source do not depend on, or that the key has in another form.
_ELSEWHERE = {"path", "sources", "name", "weight", "template", "packing", "shuffle", "cache"}
_BLOCK = 1 << 22  # bytes


@dataclass(frozen=True)
class Entry:
    """The tokens of a source, and what was seen when they were made."""

    examples: Examples
    rows: Rows  # without the rows
    lengths: Lengths
    notes: list[str]


def cached(task: Tokenising, directory: str | None) -> Entry:
    """The source's tokens out of the cache, where they are put first if they are not there.

    directory: of the cache (data.cache); None: the user's.

    Raises:
        DataError: as `task` has it; or the directory cannot be used.
    """
    before = [file_state(path) for path in task.source.paths]
    digests, lines = _digests(task.source.paths)
    home = home_of(directory)
    place = home / key_of(task, digests)
    with _told(home):
        found = _open(place, task)
        if found is None:
            with _locked(place, task):
                found = _open(place, task) or _build(place, task, lines)
        if found is None:
            raise DataError(f"data.cache {home}: what was written there cannot be read back; is the disk sound?")
    if before != [file_state(path) for path in task.source.paths]:
        _discard(place)
        raise DataError(f"{listing(task.source.paths, 3)}: changed while it was read; start again when it is whole")
    return found


def key_of(task: Tokenising, digests: list[str], without: Set[str] = frozenset()) -> str:
    """The name of an entry: SHA-256 of all that its tokens depend on. digests: of the files, in order. without: options
    that are left out."""
    options = {**task.section.model_dump(), **task.source.model_dump()}
    told = {
        "format": FORMAT,
        "code": _code(),
        "libraries": {name: version(name) for name in ("tokenizers", "jinja2")},
        "files": [[Path(path).suffixes, digest] for path, digest in zip(task.source.paths, digests, strict=True)],
        "options": {name: value for name, value in options.items() if name not in _ELSEWHERE | without},
        "template": task.template and task.template.source,
        "tokenizer": _tokenizer(task.tokenizer),
        "virtual": task.virtual,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _tokenizer(tokenizer: Any) -> list[Any]:
    """What decides how it works; how it last padded or cut does not."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    words = {name: value for name, value in core.items() if name not in ("truncation", "padding")}
    digest = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
    return [digest, tokenizer.special_tokens_map, tokenizer.split_special_tokens]


@cache
def _code() -> str:
    """SHA-256 of the code that makes tokens: a version number that nobody can forget to raise."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def file_state(path: str) -> list[int]:
    """[bytes, time of the last change], or DataError for what is not a file that can be read again."""
    try:
        found = Path(path).stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if stat.S_ISFIFO(found.st_mode):
        raise DataError(f"{path}: a pipe, which can be read only once; write its contents to a file")
    return [found.st_size, found.st_mtime_ns]


def _digests(paths: list[str]) -> tuple[list[str], int | None]:
    """(SHA-256 of each file, how many lines they have in all; None where a line is not a row)."""
    digests, lines = [], 0
    for path in paths:
        digest = hashlib.sha256()
        try:
            with Path(path).open("rb", buffering=0) as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    lines += block.count(b"\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        digests.append(digest.hexdigest())
    return digests, lines if all(path.endswith(".jsonl") for path in paths) else None


def _open(place: Path, task: Tokenising) -> Entry | None:
    """The entry, if it is there and its files have the sizes that they were written with."""
    if not place.exists():
        return None
    found = damages(place, 0, read=False)
    try:
        if not found:
            entry = _read(place, task.source.paths)
            with contextlib.suppress(OSError):  # somebody else's, or of a disk that is only read
                os.utime(place)  # so that entries which nobody needs can be told by their age
            return entry
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        found = [str(error)]
    warn(f"{place}: damaged ({listing(found, 3)}); it is made again")
    return None


def _read(place: Path, paths: list[str]) -> Entry:
    """paths: of the files, which may have had other names when the entry was made."""
    counts = read_json(place / COUNTS, CheckpointError)
    counts = _moved(list(zip(counts["paths"], paths, strict=True)), counts)
    kinds = (TOKENS, counts["kind"]), (SUPERVISED, "?"), (STARTS, "<i8")
    arrays: list[np.ndarray] = [np.memmap(place / name, kind, "r").view(np.ndarray) for name, kind in kinds]
    rows = Rows(**{**counts["rows"], "unused": Counter(counts["rows"]["unused"])})
    return Entry(Examples(*arrays), rows, Lengths.of(counts["lengths"]), counts["notes"])


def _moved(names: list[tuple[str, str]], value: Any) -> Any:
    """Each text in it that begins with a file's name, with the one that it has now. names: (before, now) of each."""
    if isinstance(value, dict):
        return {key: _moved(names, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(names, inner) for inner in value]
    for before, now in names if isinstance(value, str) else []:
        if value.startswith((f"{before}:", f"{before} (row ")):
            return now + value[len(before) :]
    return value


def _build(place: Path, task: Tokenising, lines: int | None) -> Entry | None:
    """Make the entry, whole or not at all."""
    _discard(place)
    partial = _beside(place)
    try:
        kind = "<u2" if vocabulary_size(task.tokenizer) <= 1 << 16 else "<i4"
        _write(partial, task.examples(lines), kind)
        rows = {item.name: getattr(task.rows, item.name) for item in fields(Rows) if item.name != "rows"}
        counts = {
            "kind": kind,
            "paths": task.source.paths,
            "rows": rows,
            "lengths": asdict(task.lengths),
            "notes": task.notes(),
        }
        (partial / COUNTS).write_text(json.dumps(counts), encoding="utf-8")
        write_manifest(partial, 0, {})
        _move(partial, place)
        sync(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _open(place, task)


def _move(partial: Path, place: Path) -> None:
    try:
        partial.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise  # else: without locks another process has been quicker


def _write(home: Path, parts: Iterator[Examples], kind: str) -> None:
    end = 0
    with (home / TOKENS).open("wb") as tokens, (home / SUPERVISED).open("wb") as mask, (home / STARTS).open("wb") as at:
        at.write(np.zeros(1, "<i8").tobytes())
        for part in parts:
            tokens.write(part.tokens.astype(kind).tobytes())
            mask.write(part.supervised.tobytes())
            at.write((part.starts[1:] + end).astype("<i8").tobytes())
            end += len(part.tokens)


def _discard(place: Path) -> None:
    """Remove an entry that is not to be used: out of its place first, at once."""
    if place.exists():
        old = _beside(place)
        place.rename(old / "old")
        shutil.rmtree(old, ignore_errors=True)


def _beside(place: Path) -> Path:
    """A new directory for what is not the entry. Not tempfile's: others may share the cache, and read."""
    found = place.with_name(f"{place.name}.{secrets.token_hex(4)}{PARTIAL}")
    found.mkdir()
    return found


@contextlib.contextmanager
def _locked(place: Path, task: Tokenising) -> Iterator[None]:
    """Wait until no other process builds this entry; a lock dies with its process."""
    handle = os.open(place.with_name(place.name + LOCK), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        waiting = False
        while not (locked := try_lock(handle)) and locked is not None:
            if not waiting:
                say(f"Another process tokenises {listing(task.source.paths, 3)}; waiting for it ...")
            waiting = True
            time.sleep(0.2)
        if locked:  # so whoever was at these is dead
            for left in place.parent.glob(f"{place.name}.*{PARTIAL}"):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def home_of(directory: str | None) -> Path:
    """The directory of the cache, made if it is not there."""
    if directory is not None:
        home = expanded(directory)
        with _told(home):
            home.mkdir(parents=True, exist_ok=True)
        return home
    base = os.environ.get("JAXTUNE_CACHE")
    try:
        home = (expanded(base) if base else user_cache()) / "tokens"
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
        problem = f"{home}: cannot be written (Permission denied)"
    except OSError as error:
        problem = f"{home}: cannot be written ({error.strerror or 'OSError'})"
    except ConfigError as error:
        problem = str(error)
    home = _temporary()
    warn(f"{problem}; tokens are kept for this run alone. data.cache names another directory")
    return home


@cache
def _temporary() -> Path:
    home = temporary_directory("jaxtune-tokens-")
    atexit.register(home.cleanup)
    return Path(home.name)


@contextlib.contextmanager
def _told(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data.cache {home}: cannot be used: {error.strerror or error}; set data.cache (or JAXTUNE_CACHE) to a "
            "directory that you may write to, with room for some 3 to 5 bytes a token"
        ) from None
