"""Which files a source's path names: a file, a directory, a pattern, or a data set of the hub."""

import glob
from pathlib import Path

from jaxtune.config import EvalSection
from jaxtune.console import warn
from jaxtune.data.hub_files import hub_files, is_hub_id
from jaxtune.data.sources import ALLOWED, is_data, kind_of
from jaxtune.data_section import SourceSection
from jaxtune.errors import DataError, listing
from jaxtune.files import expanded


def held_source(first: SourceSection, section: EvalSection) -> SourceSection:
    """The source of eval.path, which is read as the first of the data is. Of the same data set on the hub it takes
    the same revision and subset.
    """
    other = {} if section.path == first.path else {"subset": None, "revision": None}
    return first.model_copy(update={"path": section.path, "split": section.split, "num_samples": None, **other})


def with_files(section: SourceSection, key: str = "data.path", split: str = "train") -> SourceSection:
    """A source with the files themselves in place of what names them, path after path. `key` names it in errors.

    split: of a data set on the hub whose section names none.

    A directory stands for the files in it, a pattern for those that it matches, either sorted by name; hidden files
    are left out, and so are those of a kind that cannot be read, which is said.

    Raises:
        DataError: a path names no file.
    """
    files = [file for path in section.paths for file in _find(path, key, section, split)]
    return section.model_copy(update={"path": files, "split": None, "subset": None, "revision": None})


def _find(path: str, key: str, section: SourceSection, split: str) -> list[str]:
    where = expanded(path)
    try:
        is_there = where.exists()
    except OSError as problem:
        several = "; write several as a list: [a.json, b.json]" if "," in path else ""
        raise DataError(f"{key} {path}: cannot be read: {problem.strerror}{several}") from None
    if not is_there and is_hub_id(path):
        return hub_files(path, section.split or split, section.subset, section.revision)
    _only_of_the_hub(section, f"{key} {path}")
    if where.is_dir():
        return _readable(path, sorted(str(entry) for entry in where.iterdir() if entry.name[0] != "."), key)
    if glob.has_magic(path) and not is_there:
        return _readable(path, sorted(glob.glob(str(where), recursive=True)), key)
    if not is_there and not kind_of(path)[0]:
        raise DataError(
            f"{key} {path}: no such file or directory, and not the id of a data set on the hub (owner/name)"
        )
    return [str(where) if path.startswith("~") else path]


def _only_of_the_hub(section: SourceSection, where: str) -> None:
    for name in ("split", "subset", "revision"):
        if getattr(section, name) is not None:
            raise DataError(f"{where}: {name} is of a data set on the hub (owner/name), and this is a local path")


def _readable(path: str, found: list[str], key: str) -> list[str]:
    """Those of the found files that can be read; the others are named."""
    kept = [name for name in found if is_data(name) and Path(name).is_file()]
    others = [Path(name).name for name in found if not kind_of(name)[0] and Path(name).is_file()]
    if not kept:
        names = listing(sorted({*others, *(f"{Path(name).name}/" for name in found if Path(name).is_dir())}))
        raise DataError(f"{key} {path}: no data file; found {names or 'nothing'}; allowed: {ALLOWED}")
    if others:
        warn(f"{key} {path}: not read, being of another kind: {listing(others)}")
    return kept
