"""LLaMA-Factory's dataset_info.json: names, and for each a file and how its rows are read. Entries become sources.

What the entries mean was read off LLaMA-Factory 0.9.5, its data/README.md and its source. Hubs other than Hugging
Face's and scripts are refused, and so are preferences, in words that say what to do; rows with pictures are, one by
one.
"""

import os
from pathlib import Path, PureWindowsPath
from typing import Any

from jaxtune.config import DataSection
from jaxtune.data.hub_files import is_hub_id
from jaxtune.data.records import kind
from jaxtune.data_section import Columns, MixedSource, Tags
from jaxtune.errors import DataError, listing, nearest
from jaxtune.files import expanded, read_json

INFO = "dataset_info.json"
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
_COLUMNS = {  # theirs -> ours
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    "sharegpt": {"messages": "conversations"},
    "messages": {"messages": "messages"},
}
_SHARED = {"system": "system", "tools": "tools"}
_DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_KEYS = {"role_tag": "from", "content_tag": "value"}
_TAGS = {
    **_KEYS,
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_HUB = "hf_hub_url"  # an id, owner/name, which goes before a file
_ELSEWHERE = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_MEDIA = ("images", "videos", "audios")
_PREFERENCES = ("chosen", "rejected", "kto_tag")
_KNOWN = ("file_name", _HUB, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags")
_KNOWN_COLUMNS = (*_DEFAULTS, "history", *_SHARED, *_MEDIA, *_PREFERENCES)


def read_sources(section: DataSection) -> list[MixedSource]:
    """The sources that data.dataset names, out of the dataset_info.json in data.dataset_dir.

    Raises:
        DataError: the file cannot be read, a name is not in it, or an entry is not one of text to be imitated.
    """
    path = expanded(section.dataset_dir) / INFO
    info, sources = read_json(path, DataError), []
    for name in section.datasets:
        if name not in info:
            close = nearest(name, info) or "."
            raise DataError(f"data.dataset: {path} has no {name!r:.80}{close} It has {listing(info)}")
        sources.append(_source(_Entry(f"{path}: {name}", info[name]), name, path.parent, section.system))
    return sources


class _Entry:
    """One entry of the file, with the errors that a wrong value gives."""

    def __init__(self, where: str, value: Any):
        self.where = where
        self.value = self._object(value, "the entry")

    def wrong(self, what: str) -> DataError:
        return DataError(f"{self.where}: {what}")

    def section(self, key: str, known: tuple[str, ...]) -> dict[str, str | None] | None:
        """An object of names inside the entry; None: it has none."""
        if self.value.get(key) is None:
            return None
        found = self._object(self.value[key], key)
        for name, value in found.items():
            if name not in known:
                raise self.wrong(f'{key} has "{name}"{nearest(name, known) or "."} Allowed: {listing(known, 20)}')
            if not isinstance(value, str | None):
                raise self.wrong(f"{key}.{name} is {kind(value)}; expected a name")
        return found

    def _object(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise DataError(f"{self.where}: {what} is {kind(value)}; expected an object")
        return value


def _source(entry: _Entry, name: str, directory: Path, system: str | None) -> MixedSource:
    _check_readable(entry)
    columns = entry.section("columns", _KNOWN_COLUMNS)
    format = _format(entry, columns)
    media = [name for key, name in (columns or {}).items() if key in _MEDIA and name]
    settings: dict[str, Any] = {"columns": _columns(entry, columns, format), "without": media}
    if format in ("sharegpt", "messages"):
        settings["tags"] = _tags(entry)
    if format != "text":
        settings |= {"system": system, "dialect": "llamafactory"}
    samples = entry.value.get("num_samples")
    if samples is not None and (type(samples) is not int or samples < 1):
        raise entry.wrong(f"num_samples is {samples!r:.40}; expected a number of rows")
    settings |= _hub(entry) if entry.value.get(_HUB) is not None else {"path": _paths(entry, directory)}
    return MixedSource(name=name, format=format, num_samples=samples, **settings)


def _check_readable(entry: _Entry) -> None:
    """Whether the entry is a file of text to be imitated."""
    found = entry.value
    for key in _ELSEWHERE:
        if found.get(key) is not None:
            raise entry.wrong(f"{key} {found[key]!r:.80}: rows come from files; download it, and name it by file_name")
    for key in found:
        if key not in _KNOWN and key not in _ELSEWHERE:
            raise entry.wrong(f'unknown key "{key}"{nearest(key, _KNOWN) or "."} Allowed: {listing(_KNOWN, 20)}')
    if found.get("ranking"):
        raise entry.wrong("ranking: true: preferences cannot be learnt from here, only answers to be imitated")
    if found.get(_HUB) is None and found.get("split") not in (None, "train"):
        raise entry.wrong(f"split {found['split']!r:.40}: a file has one split, train; name the part by file_name")


def _format(entry: _Entry, columns: dict[str, str | None] | None) -> Any:
    """Ours. An alpaca entry that names a prompt and no answer is text to be continued."""
    formatting = entry.value.get("formatting", "alpaca")
    if formatting not in _FORMATS:
        raise entry.wrong(f"formatting is {formatting!r:.40}; allowed: {listing(_FORMATS)}")
    named = {name for name, value in (columns or {}).items() if value} - {*_MEDIA}
    for key in _PREFERENCES:
        if key in named:
            what = f'preferences cannot be learnt from here; where the rows have none, take "{key}" out of columns'
            raise entry.wrong(f"columns.{key}: {what}")
    alone = named == {"prompt"}
    return "text" if formatting == "alpaca" and alone else _FORMATS[formatting]


def _columns(entry: _Entry, named: dict[str, str | None] | None, format: str) -> Columns:
    """Their columns under our names. Where an entry names any, those that it does not name are absent."""
    found = named if named is not None else _DEFAULTS
    if format == "text":
        return Columns(text=str(found["prompt"]))
    names = {**_COLUMNS[format], **_SHARED}
    given: dict[str, Any] = {ours: found.get(theirs) or None for theirs, ours in names.items()}
    for theirs, ours in names.items():
        if given[ours] is None and Columns.model_fields[ours].annotation is str:
            raise entry.wrong(f'columns has no "{theirs}", without which there is nothing to learn; name it')
    return Columns(**given)


def _tags(entry: _Entry) -> Tags:
    """Where an entry names any, a speaker that it does not name does not occur."""
    named = entry.section("tags", tuple(_TAGS))
    found = _TAGS if named is None else {**_KEYS, **named}
    return Tags(**{name.removesuffix("_tag"): found.get(name) or "" for name in _TAGS})


def _hub(entry: _Entry) -> dict[str, Any]:
    """The id of a data set on the hub, and what of it is read."""
    found = {name: entry.value.get(name) for name in (_HUB, "split", "subset")}
    for name, value in found.items():
        if not isinstance(value, str | None):
            raise entry.wrong(f"{name} is {kind(value)}; expected a name")
    path = str(found[_HUB])
    if not is_hub_id(path):
        raise entry.wrong(f"{_HUB} {path!r:.80} is not the id of a data set on the hub (owner/name)")
    if entry.value.get("folder") is not None:
        raise entry.wrong("folder: a directory of a data set on the hub; name it by subset")
    return {"path": path, "split": found["split"], "subset": found["subset"]}


def _paths(entry: _Entry, directory: Path) -> list[str]:
    """The entry's file, or the files in its directory by name; either lies under `directory`."""
    name = entry.value.get("file_name")
    if not isinstance(name, str) or not name:
        raise entry.wrong("no file_name; it names a file, or a directory of files, beside dataset_info.json")
    parts = PureWindowsPath(name)  # which knows both slashes
    if ".." in parts.parts or parts.anchor:
        raise entry.wrong(f"file_name {name!r:.80} leads out of {directory}; it is a path inside it")
    path = directory / name
    if os.path.isdir(path):
        files = sorted(str(file) for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise entry.wrong(f"file_name {name}: no file in {path}")
        return files
    if not os.path.exists(path):
        raise entry.wrong(f"file_name {name}: there is no {path}")
    return [str(path)]
