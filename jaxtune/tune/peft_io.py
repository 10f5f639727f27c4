"""PEFT adapter directories, out and in. Names of tensors are peft_tensors.py's, settings peft_config.py's."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save

from jaxtune import processes
from jaxtune.config import TuneSection
from jaxtune.errors import AdapterError, listing
from jaxtune.models.weights import Tree
from jaxtune.tune.method import get_path
from jaxtune.tune.peft_config import CONFIG_NAME, is_resolved, read_config, resolve, to_peft
from jaxtune.tune.peft_tensors import TENSORS_NAME, AdapterFile, Entry, entries, open_adapter
from jaxtune.tune.plan import make_plan


def load_adapter(directory: str | Path) -> tuple[TuneSection, AdapterFile]:
    """The settings of an adapter directory, with `adapter` naming it, and its tensors.

    `layout` and `apply` with these settings put the adapter on a model.

    Raises:
        AdapterError: not an adapter, a pickled one, or one with options that we do not have.
    """
    return read_config(Path(directory)), open_adapter(directory)


def save_adapter(
    directory: str | Path, section: TuneSection, weights: Tree, params: Tree, base_model_name: str | None = None
) -> None:
    """Write the adapter in `params` as a PEFT directory: float32, the same bytes for the same numbers.

    Every process calls this; the first one writes, under a temporary name that is renamed at the end. An
    adapter that is there already is replaced.

    Raises:
        AdapterError: the directory holds other things.
    """
    section = section if is_resolved(section) else resolve(section)
    tensors = adapter_tensors(section, weights, params)
    if processes.is_first():
        config = json.dumps(to_peft(section, weights, base_model_name), indent=2, ensure_ascii=False)
        files = {TENSORS_NAME: save(tensors, {"format": "pt"}), CONFIG_NAME: f"{config}\n".encode()}
        _replace_directory(Path(directory), files)
    processes.barrier("adapter saved")


def adapter_tensors(section: TuneSection, weights: Tree, params: Tree) -> dict[str, np.ndarray]:
    """The tensors of the adapter file by name, in float32."""
    hosted: dict[tuple, np.ndarray] = {}
    tensors = {}
    for entry in entries(make_plan(section, weights), weights):
        place = (entry.path, entry.part)
        if place not in hosted:
            leaf = get_path(params, entry.path)
            hosted[place] = _to_host(getattr(leaf, entry.part) if entry.part else leaf)
        tensors[entry.key] = _of_entry(hosted[place], entry)
    return tensors


def _of_entry(array: np.ndarray, entry: Entry) -> np.ndarray:
    value = array if entry.row is None else array[entry.row]
    if entry.part is not None:
        value = value.T[: entry.shape[0], : entry.shape[1]]
    return np.ascontiguousarray(value, np.float32)


def _to_host(array: jax.Array) -> np.ndarray:
    """The whole array, also where other processes hold parts of it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _replace_directory(directory: Path, files: dict[str, bytes]) -> None:
    """Put the files into a new directory and give it the name; what had it before goes last."""
    others = sorted(path.name for path in directory.iterdir() if path.name not in files) if directory.is_dir() else []
    if others or (directory.exists() and not directory.is_dir()):
        raise AdapterError(f"{directory}: not an adapter directory; it holds {listing(others)}. Nothing was written")
    fresh, old = (directory.with_name(f".{directory.name}.{word}") for word in ("partial", "replaced"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    for name, content in files.items():
        with open(fresh / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    if directory.exists():
        directory.rename(old)
    fresh.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
