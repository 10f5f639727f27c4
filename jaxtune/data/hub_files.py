"""The files of a data set on the Hugging Face hub: which of them make a split, and where they lie once fetched.

A repository is read as the datasets library reads it: by the `configs` at the head of its README.md or, without them,
by the names of its files and directories. Scripts in it are never run.
"""

import re
from collections import Counter
from glob import escape
from pathlib import Path
from typing import Any

from jaxtune.config import parse_yaml
from jaxtune.console import stage, warn
from jaxtune.data.sources import is_data, kind_of
from jaxtune.errors import ConfigError, DataError, listing
from jaxtune.hub import HUB_ID, check_cache, why

# What a split is called in names of files and directories.
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"data/(.+)-\d{5}-of-\d{5}\.[^/]+")
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.[^/]+)")
_CONVERTED = "refs/convert/parquet"  # a branch on which the hub keeps many data sets as Parquet


def is_hub_id(path: str) -> bool:
    """Whether a path that is not there may be a data set's id, owner/name."""
    return "/" in path and not kind_of(path)[0] and HUB_ID.fullmatch(path) is not None


def hub_files(path: str, split: str, subset: str | None = None, revision: str | None = None) -> list[str]:
    """The local files of a split, fetched into the hub's cache unless they are there already.

    subset: a configuration of the README.md, or a directory; None: the only one, or the one called default.
    revision: branch, tag or commit; None: the main branch.

    Raises:
        DataError: the hub cannot be reached, there is no such split, or there is nothing but a script.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    check_cache(path, DataError)
    stage(f"Fetching the {split} split of {path}")
    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
    try:
        home = Path(snapshot_download(path, allow_patterns=["README.md"], **options))
        names = choose(path, _names(path, home, options), _readme(home), split, subset)
        home = Path(snapshot_download(path, allow_patterns=[escape(name) for name in names], **options))
    except (OSError, HFValidationError) as problem:
        raise DataError(why(path, revision, problem, "data set")) from None
    return [str(home / name) for name in names]


def _names(path: str, home: Path, options: dict[str, Any]) -> list[str]:
    """The repository's files; without a connection, those that were fetched before."""
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(path, **options)
    except OSError:
        warn(f"{path}: the hub cannot be reached; only what was fetched before is seen")
        names = [file.relative_to(home).as_posix() for file in home.rglob("*") if file.is_file()]
    return sorted(name for name in names if ".." not in name.split("/") and not re.search(r"(^|/)\.", name))


def _readme(home: Path) -> Any:
    """The YAML at the head of README.md, where there is one."""
    file = home / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        return parse_yaml(head[1], f"{file}") if head else None
    except ConfigError:
        return None  # it is a page for people first


def choose(path: str, names: list[str], readme: Any, split: str, subset: str | None) -> list[str]:
    """Which of a repository's files make a split.

    names: of all its files, sorted; readme: the head of its README.md.

    Raises:
        DataError: none do, or some of them are missing.
    """
    configs = _configs(readme)
    if configs:
        found = _listed(path, names, configs, split, subset)
    else:
        files = [name for name in names if is_data(name) and kind_of(name)[0] != ".txt"]
        if not files:
            raise DataError(f"{path}: {_no_data(names)}")
        found = _named(path, _below(path, files, subset), split)
    return _whole(path, _of_one_kind(path, found))


def _no_data(names: list[str]) -> str:
    scripts = [name for name in names if name.endswith(".py")]
    if scripts:
        return (
            f"this data set has no data files, only a script ({listing(scripts)}), and code of a repository is never "
            f"run; try data.revision: {_CONVERTED}, or save it elsewhere as .jsonl or .parquet and give that path"
        )
    return f"this hub repository has no data files; found {listing(names) or 'nothing'}"


# --- by the README's head ---


def _configs(readme: Any) -> dict[str, dict]:
    """Its configurations that list files, by name."""
    found = readme.get("configs") if isinstance(readme, dict) else None
    named = [config for config in found if isinstance(config, dict)] if isinstance(found, list) else []
    return {str(config.get("config_name", "default")): config for config in named if "data_files" in config}


def _listed(path: str, names: list[str], configs: dict[str, dict], split: str, subset: str | None) -> list[str]:
    defaults = [name for name, config in configs.items() if config.get("default") is True] or ["default", *configs][:1]
    name = subset or (next(iter(configs)) if len(configs) == 1 else defaults[0])
    if name not in configs:
        missing = "several subsets" if subset is None else f"no subset {subset}"
        raise DataError(f"{path}: {missing}; set data.subset to one of {listing(configs, 40)}")
    splits = _splits(configs[name]["data_files"])
    if split not in splits:
        raise DataError(f"{path}: no split {split}; found {listing(splits, 40)}; set data.split")
    below = f"{configs[name]['data_dir']}/" if isinstance(configs[name].get("data_dir"), str) else ""
    patterns = [_pattern(below + one.removeprefix("./")) for one in splits[split]]
    found = [file for file in names if any(pattern.fullmatch(file) for pattern in patterns) and kind_of(file)[0]]
    if not found:
        raise DataError(f"{path}: no file matches {listing(splits[split])}, which its README.md names for {split}")
    return found


def _splits(files: Any) -> dict[str, list[str]]:
    """The patterns of each split, out of any form that data_files may have."""
    if isinstance(files, dict):
        return {str(name): _strings(paths) for name, paths in files.items()}
    parts = files if isinstance(files, list) else [files]
    if any(isinstance(part, dict) for part in parts):
        return {str(part.get("split", "train")): _strings(part.get("path")) for part in parts if isinstance(part, dict)}
    return {"train": _strings(parts)}


def _strings(found: Any) -> list[str]:
    return [str(one) for one in (found if isinstance(found, list) else [found])]


def _pattern(text: str) -> re.Pattern[str]:
    """A pattern of paths: * and ? stay within a directory, ** does not."""
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", text)
    return re.compile("".join(signs.get(part) or re.escape(part) for part in parts))


# --- by names ---


def _below(path: str, files: list[str], subset: str | None) -> list[str]:
    """The files of a subset, which is a directory."""
    tops = sorted({file.split("/")[0] for file in files if "/" in file})
    if subset is not None:
        found = [file for file in files if file.startswith(f"{subset}/")]
        if not found:
            raise DataError(f"{path}: no subset {subset}; found {listing(tops, 40) or 'none'}")
        return found
    if len(tops) > 1 and all("/" in file for file in files) and not any(_split_in(top) for top in tops):
        raise DataError(f"{path}: several subsets; set data.subset to one of {listing(tops, 40)}")
    return files


def _named(path: str, files: list[str], split: str) -> list[str]:
    """The files whose names or directories say that they are of a split; without any such, all are train."""
    told = {file: match[1] for file in files if (match := _SHARD.fullmatch(file))}
    told = told or {file: name for file in files if (name := _split_of(file, split))}
    if not told and split == "train":
        return files
    found = [file for file, name in told.items() if name == split]
    if not found:
        names = listing(sorted(set(told.values())), 40) or "none that a name tells of, so all is train"
        raise DataError(f"{path}: no split {split}; found {names}; set data.split")
    return found


def _split_of(file: str, asked: str) -> str | None:
    """What the innermost directory, or else the name, says; `asked` may be a word that no other data set has."""
    *directories, name = file.split("/")
    return next((found for part in [*reversed(directories), name] if (found := _split_in(part, asked))), None)


def _split_in(part: str, asked: str = "train") -> str | None:
    words = {asked: (asked,)} | WORDS
    for split, names in words.items():
        if any(re.search(rf"(^|[-._ 0-9]){re.escape(name)}([-._ 0-9]|$)", part) for name in names):
            return split
    return None


# --- what was found ---


def _of_one_kind(path: str, files: list[str]) -> list[str]:
    """Those of the commonest kind: the same rows often lie there as .csv and as .parquet."""
    counts = Counter(kind_of(file)[0] for file in files)
    kind = counts.most_common(1)[0][0]
    if len(counts) > 1:
        others = [file for file in files if kind_of(file)[0] != kind]
        warn(f"{path}: only its {kind} files are read, not {listing(others, 3)}")
    return [file for file in files if kind_of(file)[0] == kind]


def _whole(path: str, files: list[str]) -> list[str]:
    """The files, or DataError when one of NNNNN-of-NNNNN is missing."""
    series = Counter(found.groups() for file in files if (found := _PART.fullmatch(file)))
    for (start, count, end), there in series.items():
        if there < int(count):
            raise DataError(f"{path}: {start}-*-of-{count}{end}: only {there} of {int(count)} files are there")
    return files
