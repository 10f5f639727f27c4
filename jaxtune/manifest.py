"""Whether a directory's files are still as they were written: a list of them, with sizes and SHA-256, made last.

checkpoint.py decides what to do about it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jaxtune.errors import CheckpointError
from jaxtune.files import read_json

MANIFEST = "manifest.json"
FORMAT = 1


def write_manifest(home: Path, step: int, arrays: dict[str, list]) -> None:
    """List every file below `home`, with everything on the disk before the list is.

    arrays: path -> [type, *shape] of what the files hold, for readers to compare with what they want.
    """
    files = {}
    for path in sorted(path for path in home.rglob("*") if path.is_file()):
        sync(path)
        files[path.relative_to(home).as_posix()] = [path.stat().st_size, _digest(path)]
    body = {"format": FORMAT, "step": step, "files": files, "arrays": arrays}
    text = json.dumps({**body, "sha256": _body_digest(body)}, indent=1)
    (home / MANIFEST).write_text(text, encoding="utf-8")
    sync(home / MANIFEST)
    sync(home)


def read_manifest(home: Path) -> dict[str, Any]:
    """What was written: step, files, arrays.

    Raises:
        CheckpointError: there is none, or it is damaged itself.
    """
    body = read_json(home / MANIFEST, CheckpointError)
    digest = body.pop("sha256", None)
    if digest != _body_digest(body):
        raise CheckpointError(f"{MANIFEST} is not what was written")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{MANIFEST} is of format {body['format']}; this jaxtune reads format {FORMAT}")
    return body


def damages(home: Path, step: int, read: bool) -> list[str]:
    """What is not as it was written, a line each; with read=False, by the files' sizes alone."""
    try:
        manifest = read_manifest(home)
    except CheckpointError as error:
        return [str(error)]
    if manifest["step"] != step:
        return [f"it is the checkpoint of step {manifest['step']}"]
    found = (_damage(home, name, size, digest, read) for name, (size, digest) in manifest["files"].items())
    return [damage for damage in found if damage]


def _damage(home: Path, name: str, size: int, digest: str, read: bool) -> str | None:
    path = home / name
    try:
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if read and _digest(path) != digest:
            return f"{name} is not what was written"
    except OSError as error:
        return f"{name}: {error.strerror}"
    return None


def _body_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or directory, before anything that relies on it is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
