"""The weights of a Hugging Face directory: one or many safetensors files, read by byte range.

Parsing and its bounds checks are the library's. Pickled weights are never opened.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - safetensors finds numpy's bfloat16 only once this is imported
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxtune.errors import ModelError, listing
from jaxtune.files import check_readable, inside, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16", "U8", "I8", "I32")  # integers: of quantised checkpoints
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Pages of a mapped file count as this process's memory until it is unmapped.
MAPPED_BYTES = 8 << 20

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Entry:
    """Where one weight lies."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


class SafetensorsSource:
    """The weights under their Hugging Face keys; a base model's get the `model.` that they lack."""

    def __init__(self, directory: Path, shared: Mapping[str, str] | None = None):
        """Open every header; no weight is read.

        shared: key -> the key that it stands for where the files lack that one.

        Raises:
            ModelError: no safetensors, a damaged file, or an index that does not say what the files hold.
        """
        self.where = str(directory)
        files = _weight_files(directory)
        entries = [entry for file, keys in files.items() for entry in _entries(file, keys)]
        _refuse_twice(entries)
        bare = not any(entry.name.startswith("model.") for entry in entries)
        prefix = "model." if bare and any(entry.name == "embed_tokens.weight" for entry in entries) else ""
        named = {entry.name if entry.name.startswith("lm_head.") else prefix + entry.name: entry for entry in entries}
        for key, other in (shared or {}).items():
            if key in named and other not in named:
                named[other] = named.pop(key)
        self.entries = named
        self.shapes = {key: entry.shape for key, entry in named.items()}
        self._open: tuple[Path, Any] | None = None
        self._read_bytes = 0

    def read(self, key: str, index: Index) -> np.ndarray:
        """The part `index` of the weight `key`, in the file's own dtype."""
        entry = self.entries[key]
        if entry.dtype not in DTYPES:
            raise ModelError(f"{entry.file}: {key} is {entry.dtype}; supported: {listing(DTYPES)}")
        try:
            part = self._handle(entry.file).get_slice(entry.name)[index]
        except (SafetensorError, OSError) as problem:
            raise _damaged(entry.file, problem, entry.name) from None
        self._read_bytes += part.nbytes
        return part

    def _handle(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file or self._read_bytes > MAPPED_BYTES:
            self._open, self._read_bytes = None, 0
            self._open = file, safe_open(file, framework="np")
        return self._open[1]


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The files to read, each with the keys that the index says it has (None: there is no index)."""
    single, index = directory / SINGLE, directory / INDEX
    if index.exists():
        files = _indexed(directory, inside(directory, INDEX, ModelError, str(directory)))
        if single.exists() and single not in files:
            raise ModelError(f"{directory}: both {SINGLE} and {INDEX} of other files; remove the one that is old")
        return files
    if single.exists():
        return {inside(directory, SINGLE, ModelError, str(directory)): None}
    names = sorted(entry.name for entry in directory.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise ModelError(
            f"{directory}: {listing(pickles)}: pickled weights can run code and are never opened; use the model's"
            " safetensors, or convert it where you trust it: AutoModelForCausalLM...save_pretrained(DIR)"
        )
    found = [name for name in names if name.endswith(".safetensors")]
    raise ModelError(f"{directory}: expected {SINGLE} or {INDEX}; found {listing(found) or 'no safetensors'}")


def _indexed(directory: Path, index: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(index, ModelError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f'{index}: expected "weight_map", an object of weight names and file names')
    names: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: {key} is in {name!r:.200}; allowed: a .safetensors file of {directory}")
        names.setdefault(name, set()).add(key)
    files: dict[Path, set[str] | None] = {
        inside(directory, name, ModelError, str(index)): keys for name, keys in names.items()
    }
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ModelError(
            f"{index}: {len(absent)} of {len(files)} files missing: {listing(absent)}; download them again"
        )
    return files


def _entries(file: Path, keys: set[str] | None) -> list[Entry]:
    """What the header of a file says, checked against the index."""
    check_readable(file, ModelError)
    try:
        with safe_open(file, framework="np") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
            entries = [Entry(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
    except (SafetensorError, OSError) as problem:
        raise _damaged(file, problem) from None
    found = {entry.name for entry in entries}
    if keys is not None and found != keys:
        lacks, extra = listing(sorted(keys - found)), listing(sorted(found - keys))
        raise ModelError(
            f"{file}: not what {INDEX} says; missing: {lacks or 'none'}; not in the index: {extra or 'none'}"
        )
    return entries


def _refuse_twice(entries: list[Entry]) -> None:
    files: dict[str, Path] = {}
    for entry in entries:
        other = files.setdefault(entry.name, entry.file)
        if other is not entry.file:
            raise ModelError(f"{entry.file}: {entry.name} is in {other.name} too; each weight must be in one file")


def _damaged(file: Path, problem: Exception, key: str = "") -> ModelError:
    what = " ".join(str(problem).split())
    return ModelError(f"{file}: {key}{': ' if key else ''}not a readable safetensors file ({what}); download it again")
