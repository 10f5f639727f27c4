"""Small files from strangers: JSON with limits, and names that must stay inside their directory. And our own: written
whole, and locked."""

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxtune.errors import ConfigError, SaveError, UserError

PARTIAL = ".partial"  # what a file is called until it is whole
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # a full or broken one
MAX_JSON_BYTES = 256 << 20  # a tokenizer.json has been seen at 33 MB, an index at 12 MB


def read_json(path: Path, error: type[UserError]) -> dict[str, Any]:
    """The JSON object in `path`, or `error` naming the file and what is wrong in it."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise error(f"{path}: {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read")
        value = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _refuse_constant(name: str):
    raise ValueError(f"the number {name}")


def expanded(path: str | Path) -> Path:
    """The path with a home directory in place of `~`; of a user that the system does not know, as it stands.

    Raises:
        ConfigError: one's own cannot be found; a directory would be made that is called `~`.
    """
    found = os.path.expanduser(path)
    if os.fspath(found).split(os.sep)[0] == "~":
        raise ConfigError(f"{path}: your home directory cannot be found; set HOME, or give the whole path")
    return Path(found)


def user_cache() -> Path:
    """Where what can be made again is kept for a user.

    Raises:
        ConfigError: as `expanded`.
    """
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jaxtune"


def temporary_directory(prefix: str = "jaxtune-") -> TemporaryDirectory[str]:
    """A new directory that goes when it is left.

    Raises:
        ConfigError: there is no place for one: a container's file systems may all be read-only.
    """
    try:
        return TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    except OSError as problem:
        raise ConfigError(
            f"temporary files: {problem.strerror}; set TMPDIR to a directory that you may write to"
        ) from None


def check_readable(path: Path, error: type[UserError]) -> None:
    """Refuse a file that cannot be opened: safetensors says of every such file that it is not there.

    Raises:
        error: with what the system says.
    """
    try:
        path.open("rb").close()
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None


def inside(directory: Path, name: str, error: type[UserError], where: str) -> Path:
    """The path of the file `name`, which must lie in `directory` itself, links followed.

    A snapshot in the Hugging Face cache links to files of its own repository's cache; those are inside too.
    """
    bare = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
    if not bare:
        raise error(f"{where}: file name {name!r:.200}; allowed: a bare name, of a file in {directory}")
    path, root = directory / name, directory.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise error(f"{where}: {name} is a link to {path.resolve()}, outside {directory}; put the file itself there")
    return path


def check_new(directory: Path, error: type[UserError]) -> None:
    """Refuse what is already there where a directory is to be made; an empty one will do, if it can be replaced.

    Raises:
        error: something is there, or it is a mount point or the working directory.
    """
    try:
        there = directory.exists()
        taken = directory.is_symlink() or (there and not (directory.is_dir() and _is_empty(directory)))
    except OSError as problem:
        raise error(f"{directory}: cannot be made: {problem.strerror}") from None
    if taken or directory.name == "..":
        raise error(f"{directory}: is there already; give a new directory, or remove it")
    if os.path.ismount(directory):
        raise error(f"{directory}: is a mount point, which cannot be replaced; give a directory inside it")
    if there and directory.samefile("."):
        raise error(f"{directory}: is the working directory, which cannot be replaced; give a directory inside it")


@contextlib.contextmanager
def sole_writer(directory: Path, error: type[UserError]) -> Iterator[None]:
    """Keep other processes from making the same new directory. The lock of one that was killed is free.

    Raises:
        error: another one makes it or, since it was last looked for, has made it; or its parent cannot be written to.
    """
    path = directory.parent / f".{directory.name}.lock"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as problem:
        raise unwritten(error, directory, problem) from None
    try:
        if try_lock(handle) is False or not is_at(handle, path):
            raise error(f"{directory}: another process writes it; wait for it or stop it, or give another directory")
        try:
            check_new(directory, error)
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def check_replaceable(directory: Path, error: type[UserError]) -> None:
    """Refuse what is no directory where one is to be written anew: a file, or a link, behind which others may lie.

    Raises:
        error: it is in the way.
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise error(f"{directory}: is in the way; give another directory, or remove it")


def _is_empty(directory: Path) -> bool:
    return not any(directory.iterdir())


def is_disks(problem: Exception) -> bool:
    """Whether it is the disk's fault, and no other place has to be asked for. Libraries in Rust say so in words."""
    found = re.search(r"\(os error (\d+)\)", str(problem))
    return (int(found[1]) if found else getattr(problem, "errno", None)) in DISK


def unwritten(error: type[UserError], directory: str | Path, problem: Exception) -> UserError:
    """What to raise where a directory cannot be written: a failure, where it is the disk's fault."""
    made = error(f"{directory}: cannot be written: {' '.join(str(problem).split())}")
    made.exit_code = SaveError.exit_code if is_disks(problem) else error.exit_code
    return made


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all. A link stays one, and a device is written to as it is."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def try_lock(handle: int) -> bool | None:
    """Whether the lock on an open file was got, for as long as it is open; None: its file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return None
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


def is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of that name; who had its lock may just have taken it away."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
