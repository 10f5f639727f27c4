"""PEFT adapter directories, out and in. Names of tensors are peft_tensors.py's, settings peft_config.py's."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save

from jaxtune import processes
from jaxtune.errors import AdapterError, listing
from jaxtune.files import check_replaceable, unwritten
from jaxtune.hf_write import TOKENIZER_FILES
from jaxtune.models.weights import Tree
from jaxtune.section import TuneSection
from jaxtune.tokenizer import save_tokenizer
from jaxtune.tune.method import get_path
from jaxtune.tune.peft_config import CONFIG_NAME, is_resolved, read_config, resolve, to_peft
from jaxtune.tune.peft_files import Entry, Files
from jaxtune.tune.peft_tensors import AdapterFile, open_adapter


def load_adapter(directory: str | Path) -> tuple[TuneSection, AdapterFile]:
    """The settings of an adapter directory, with `adapter` naming it, and its tensors.

    `layout` and `apply` with these settings put the adapter on a model.

    Raises:
        AdapterError: not an adapter, a pickled one, or one with options that we do not have.
    """
    section = read_config(Path(directory))
    return section, open_adapter(directory, files_of(section).tensors_name)


def save_adapter(
    directory: str | Path,
    section: TuneSection,
    weights: Tree,
    params: Tree,
    base_model_name: str | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
) -> None:
    """Write the adapter in `params` as a PEFT directory: float32, the same bytes for the same numbers.

    tokenizer: written beside it, where the adapter's tokens are not all the base model's. revision: of a base model
    on the hub.

    Every process calls this; the first one writes, under a temporary name that is renamed at the end. An
    adapter that is there already is replaced.

    Raises:
        AdapterError: the directory holds other things, or cannot be written.
    """
    section = section if is_resolved(section) else resolve(section)
    section, params = files_of(section).stored(section, weights, params)
    files = files_of(section)
    tensors = {files.tensors_name: adapter_tensors(section, weights, params)}
    derived = files.derived(section)
    if derived is not None:
        made = {name: _to_host(array) for name, array in derived.tensors(section, params).items()}
        tensors = {files.tensors_name: made, derived.file: tensors[files.tensors_name]}
    if processes.is_first():
        words = _tokenizer_files(tokenizer, directory)
        write_adapter(Path(directory), section, weights, tensors, base_model_name, words, revision)
    processes.barrier("adapter saved")


def write_adapter(
    directory: Path,
    section: TuneSection,
    weights: Tree,
    tensors: dict[str, dict[str, np.ndarray]],
    base_model_name: str | None,
    others: Mapping[str, bytes] = MappingProxyType({}),
    revision: str | None = None,
) -> None:
    """Write the settings and, by their files' names, tensors and other contents; what was there is replaced at the end.

    Raises:
        AdapterError: the directory holds other things, or cannot be written.
    """
    config = json.dumps(to_peft(section, weights, base_model_name, revision), indent=2, ensure_ascii=False)
    files = {CONFIG_NAME: f"{config}\n".encode()}
    for name, arrays in tensors.items():
        # The library writes an array's memory as it lies, another tensor's where rows are not one after another.
        files[name] = save({key: np.ascontiguousarray(array) for key, array in arrays.items()}, {"format": "pt"})
    _replace_directory(directory, {**files, **others})


def _tokenizer_files(tokenizer: Any, directory: str | Path) -> dict[str, bytes]:
    """By their names. directory: where they will lie, for what is told."""
    if tokenizer is None:
        return {}
    several = isinstance(tokenizer.chat_template, dict)  # they would be files of a directory of their own
    try:
        with tempfile.TemporaryDirectory() as home:
            save_tokenizer(tokenizer, Path(home), save_jinja_files=not several)
            return {path.name: path.read_bytes() for path in Path(home).iterdir()}
    except OSError as problem:
        raise unwritten(AdapterError, directory, problem) from None


def adapter_tensors(section: TuneSection, weights: Tree, params: Tree) -> dict[str, np.ndarray]:
    """The tensors of the method's entries by name, in float32."""
    hosted: dict[tuple, np.ndarray] = {}
    tensors: dict[str, np.ndarray] = {}
    for entry in files_of(section).entries(section, weights):
        place = (entry.path, entry.part)
        if place not in hosted:
            leaf = get_path(params, entry.path)
            hosted[place] = _to_host(getattr(leaf, entry.part) if entry.part else leaf)
        if entry.key not in tensors:
            tensors[entry.key] = np.zeros(entry.shape, np.float32)
        columns = slice(None) if entry.columns is None else slice(*entry.columns)
        tensors[entry.key][columns if entry.turned else (..., columns)] = _of_entry(hosted[place], entry)
    return tensors


def files_of(section: TuneSection) -> Files:
    """How PEFT stores the section's method."""
    from jaxtune.tune import METHODS

    files = METHODS[section.method].files
    assert files is not None, section.method
    return files


def _of_entry(array: np.ndarray, entry: Entry) -> np.ndarray:
    value = array if entry.row is None else array[entry.row]
    shape = entry.shape[::-1] if entry.turned else entry.shape
    shape = shape if entry.columns is None else (*shape[:-1], entry.columns[1] - entry.columns[0])
    if value.ndim == len(shape):
        value = value[tuple(slice(size) for size in shape)]
    value = value.reshape(shape)
    return np.ascontiguousarray(value.T if entry.turned else value, np.float32)


def _to_host(array: jax.Array) -> np.ndarray:
    """The whole array, also where other processes hold parts of it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _replace_directory(directory: Path, files: dict[str, bytes]) -> None:
    """Put the files into a new directory and give it the name; what had it before goes last."""
    _check_names(directory, lambda name: name in files)
    fresh, old = (directory.with_name(f".{directory.name}.{word}") for word in ("partial", "replaced"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        if old.is_symlink():
            old.unlink()
        _write_files(fresh, files)
        _put_in_place(fresh, directory, old)
    except OSError as problem:
        raise unwritten(AdapterError, directory, problem) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_target(directory: Path) -> None:
    """Refuse what is no directory of its own, or has a file that no adapter has, before there is an adapter to write.

    Raises:
        AdapterError: as `save_adapter`.
    """
    _check_names(directory, lambda name: name in (CONFIG_NAME, *TOKENIZER_FILES) or name.endswith(".safetensors"))


def _check_names(directory: Path, are_ours: Callable[[str], bool]) -> None:
    check_replaceable(directory, AdapterError)
    others = sorted(path.name for path in directory.iterdir() if not are_ours(path.name)) if directory.is_dir() else []
    if others:
        raise AdapterError(
            f"{directory}: not an adapter directory; it holds {listing(others)}; move what is there away, or give "
            "another directory. Nothing was written"
        )


def _write_files(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir(parents=True)
    for name, content in files.items():
        with open(directory / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _put_in_place(fresh: Path, directory: Path, old: Path) -> None:
    if directory.exists():
        directory.rename(old)
    try:
        fresh.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
