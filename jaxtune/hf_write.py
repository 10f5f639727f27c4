"""A Hugging Face model directory out of parameters: sharded safetensors, config, tokenizer, generation config.

It is written under a temporary name and renamed when it is whole. Reading is hf_io.py's work.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxtune import processes
from jaxtune.errors import ModelError, listing
from jaxtune.files import check_replaceable, inside, read_json, unwritten
from jaxtune.models.config import ModelConfig
from jaxtune.models.families import QUANTIZE_CONFIG, to_hf
from jaxtune.models.weights import Path as WeightPath
from jaxtune.models.weights import Tree, leaves_with_path
from jaxtune.safetensors_io import INDEX, SINGLE
from jaxtune.tokenizer import (
    cuts_alike,
    first_difference,
    load_as_transformers,
    load_tokenizer,
    save_tokenizer,
    shares_ids,
    special_ids,
    stop_ids,
    token_ids,
    tokenizer_of,
)

MARK = "written_by"  # in the metadata of each safetensors file, to know our own directories again
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
MORE_TEMPLATES = "additional_chat_templates"  # transformers' directory for those beside the default one
GENERATION = "generation_config.json"


def write_model(
    directory: Path,
    params: Tree,
    weights: Tree,
    config: ModelConfig,
    source: Path,
    dtype: Any = "float32",
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write `params` as a model that transformers loads.

    params: arrays in the structure of `weights`; adapters already merged.
    source: the directory or .gguf that the model came from; its tokenizer and generation config go along.
    tokenizer: in place of the source's own; what ends its replies is told to the generation config.
    max_shard_bytes: of one file; no more than that is copied to the host at once. In a run of several
        processes all of them call this; the first writes.

    Raises:
        ModelError: `directory` holds something that is not a model that jaxtune wrote, or cannot be written.
    """
    first = processes.is_first()
    if first:
        check_target(directory)
    partial = directory.parent / f".{directory.name}.partial"
    try:
        if first:
            _make_room(directory, partial, sum(t.num_bytes for t in _tensors(weights, jnp.dtype(dtype).itemsize)))
            _write_settings(partial, source, config, config_json(config, jnp.dtype(dtype).name), tokenizer)
        _write_weights(partial if first else None, params, weights, jnp.dtype(dtype), max_shard_bytes)
        if first:
            _put_in_place(partial, directory)
        processes.barrier("model saved")
    except (OSError, SafetensorError) as problem:
        raise unwritten(ModelError, directory, problem) from None
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_directory(
    directory: Path, source: Path, config: ModelConfig, hf: dict[str, Any], num_bytes: int, tokenizer: Any = None
) -> Iterator[Path]:
    """A directory under a temporary name, for a model's weights, with `hf` as its config.json, and with the source's
    tokenizer and generation config. Without an error it then gets its name. For one process.

    num_bytes: that the disk must have free. tokenizer: as write_model's.

    Raises:
        ModelError: as `write_model`.
    """
    check_target(directory)
    partial = directory.parent / f".{directory.name}.partial"
    try:
        _make_room(directory, partial, num_bytes)
        _write_settings(partial, source, config, hf, tokenizer)
        yield partial
        _put_in_place(partial, directory)
    except (OSError, SafetensorError) as problem:
        raise unwritten(ModelError, directory, problem) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_settings(home: Path, source: Path, config: ModelConfig, tokenizer: Any) -> None:
    """Refuse before a run what `write_model` would refuse behind it: all but the weights is written once, in `home`,
    and removed.

    Raises:
        ModelError: as `write_model`.
    """
    try:
        with TemporaryDirectory(prefix=".", dir=home) as directory:
            _write_settings(Path(directory), source, config, config_json(config, "float32"), tokenizer)
    except OSError as problem:
        raise unwritten(ModelError, home, problem) from None


def check_target(directory: Path) -> None:
    """Refuse to write over anything but a model directory that `write_model` wrote, or an empty one."""
    check_replaceable(directory, ModelError)
    if not directory.exists():
        return
    names = {entry.name for entry in directory.iterdir()}
    ours = {"config.json", INDEX, GENERATION, QUANTIZE_CONFIG, MORE_TEMPLATES, *TOKENIZER_FILES}
    files = {name for name in names if name.endswith(".safetensors")}
    strangers = sorted(names - ours - files) or sorted(n for n in files if not _is_marked(directory / n))
    if strangers or (names and not files):
        what = f"holds {listing(strangers or sorted(names))}, which jaxtune did not write"
        raise ModelError(f"{directory}: {what}; give another directory, or empty it")


def _is_marked(file: Path) -> bool:
    try:
        with safe_open(file, framework="np") as handle:
            return MARK in (handle.metadata() or {})
    except (SafetensorError, OSError):
        return False


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json, which says the dtype under the name that the original used; older readers know torch_dtype."""
    hf = to_hf(config)
    name = "dtype" if "dtype" in hf and "torch_dtype" not in hf else "torch_dtype"
    return {**{key: value for key, value in hf.items() if key not in ("dtype", "torch_dtype")}, name: dtype}


class Tensor(NamedTuple):
    """One tensor of the files, and where it is in the parameters."""

    key: str
    path: WeightPath
    place: int | None  # along axis 0 of its leaf
    layer: int | None
    num_bytes: int


def _write_weights(directory: Path | None, params: Tree, weights: Tree, dtype: np.dtype, max_bytes: int) -> None:
    """One file, or numbered files and their index. Without a directory the arrays are only gathered."""
    plan = _plan(_tensors(weights, dtype.itemsize), max_bytes)
    leaves = dict(leaves_with_path(params))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(plan, 1):
        name = SINGLE if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
        arrays = {tensor.key: _to_host(tensor, leaves[tensor.path], dtype) for tensor in shard}
        if directory is not None:
            save_file(arrays, directory / name, metadata={"format": "pt", MARK: "jaxtune"})
        weight_map |= dict.fromkeys(arrays, name)
        del arrays
    if directory is not None and len(plan) > 1:
        total = sum(tensor.num_bytes for shard in plan for tensor in shard)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensors(weights: Tree, itemsize: int) -> list[Tensor]:
    """Every tensor: the embedding, then layer by layer, where leaves are stacks of layers, then the rest."""
    tensors = []
    for path, weight in leaves_with_path(weights):
        num_bytes = itemsize * int(np.prod(weight.shape))
        if weight.layers is None:
            tensors.append(Tensor(weight.key, path, None, None, num_bytes))
            continue
        for place, (layer, key) in enumerate(zip(weight.layers, weight.keys, strict=True)):
            tensors.append(Tensor(key, path, place, layer, num_bytes))
    last = max((tensor.layer for tensor in tensors if tensor.layer is not None), default=0) + 1
    order = {"embed": -1}
    return sorted(tensors, key=lambda t: order.get(t.path[0], last) if t.layer is None else t.layer)


def _plan(tensors: list[Tensor], max_bytes: int) -> list[list[Tensor]]:
    """The tensors of each file, in order; a file has more than max_bytes only when one tensor has."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


@jax.jit
def _take(array: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, place, keepdims=False)


def _to_host(tensor: Tensor, array: jax.Array, dtype: np.dtype) -> np.ndarray:
    """One tensor in host memory, gathered from every process that holds a part."""
    # A new array either way: JAX keeps the host copy of an array for as long as the array lives.
    array = array.copy() if tensor.place is None else _take(array, tensor.place)
    if not array.is_fully_addressable:
        from jax.experimental.multihost_utils import process_allgather

        array = process_allgather(array, tiled=True)
    return np.ascontiguousarray(as_type(tensor.key, np.asarray(array), dtype))


def as_type(key: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array of a weight in another type.

    Raises:
        ModelError: a number becomes infinite in it.
    """
    with np.errstate(over="ignore"):
        result = array.astype(dtype, copy=False)
    if dtype.itemsize < array.dtype.itemsize and not np.isfinite(result).all() and np.isfinite(array).all():
        wider = "bfloat16 or float32" if dtype == np.float16 else "float32"
        largest = float(jnp.finfo(dtype).max)
        raise ModelError(f"{key} has numbers past {dtype}'s largest, {largest:g}; take dtype {wider}")
    return result


def _write_settings(directory: Path, source: Path, config: ModelConfig, hf: dict[str, Any], tokenizer: Any) -> None:
    """All but the weights."""
    own = None if tokenizer is None else tokenizer_of(source)
    write_json(directory / "config.json", hf)
    _write_tokenizer(directory, source, tokenizer, own)
    _write_generation(directory, source, config, tokenizer, own)


def _write_tokenizer(directory: Path, source: Path, tokenizer: Any, own: Any) -> None:
    """Into a directory with its config.json: transformers has classes of its own for some model_types.

    own: the source's, where `tokenizer` may be another.
    """
    is_directory = source.suffix != ".gguf"
    is_plain = is_directory and not (source / MORE_TEMPLATES).exists()
    if is_plain and (tokenizer is None or _is_same(tokenizer, own)):
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copyfile(inside(source, name, ModelError, str(source)), directory / name)
        return
    tokenizer = tokenizer or load_tokenizer(source)
    save_tokenizer(tokenizer, directory)
    again = load_as_transformers(directory)
    text = first_difference(tokenizer, again)
    as_before = is_directory and own is not None and cuts_alike(tokenizer, own)  # which was warned about on loading
    if text is not None and not as_before:
        raise ModelError(
            f"{tokenizer.name_or_path or source}: beside the config.json of this model transformers reads the tokenizer"
            f" as {type(again).__name__}, which cuts text otherwise, such as {text!r:.80}; take another tokenizer, or a"
            " model of another model_type"
        )


def _is_same(tokenizer: Any, own: Any) -> bool:
    """Whether the source's own files are this tokenizer, and can go along as they are."""
    if own is None:
        return False
    mine, theirs = (
        (t.backend_tokenizer.to_str(), t.chat_template, t.special_tokens_map, t.padding_side, t.model_max_length)
        for t in (tokenizer, own)
    )
    return mine == theirs


def _write_generation(directory: Path, source: Path, config: ModelConfig, tokenizer: Any, own: Any) -> None:
    """The source's generation config, or one made of the token ids that its config has.

    transformers stops at its eos_token_id alone, so what ends a reply of this tokenizer is put behind what stands
    there: a base model's end of text is not the end of a turn that was taught. Ids of another vocabulary are left out.
    """
    if (source / GENERATION).exists():
        found = read_json(inside(source, GENERATION, ModelError, str(source)), ModelError)
    else:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        found = {name: config.hf[name] for name in names if config.hf.get(name) is not None}
    if tokenizer is not None:
        shared = shares_ids(tokenizer, own)
        found |= {} if shared else special_ids(tokenizer)
        before = token_ids(found.get("eos_token_id"))
        ends = [*before, *(i for i in stop_ids(tokenizer, source if shared else None) if i not in before)]
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_json(directory / GENERATION, found)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _old(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.old"


def _make_room(directory: Path, partial: Path, need: int) -> None:
    """An empty `partial` on a disk that has the room; what an earlier, killed write left is put right."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    if _old(directory).exists() and not directory.exists():
        _old(directory).rename(directory)
    for left in (partial, _old(directory)):
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(directory.parent).free
    if free < need:
        told = f"the weights need {-(-need >> 20)} MiB, the disk has {free >> 20} MiB free"
        raise OSError(errno.ENOSPC, told)  # as a write would, further on
    partial.mkdir()


def _put_in_place(partial: Path, directory: Path) -> None:
    """Rename, after everything is on the disk; what was there before goes only then."""
    allowed = 0o666 & ~_umask()
    for file in [*partial.rglob("*"), partial]:
        if file.is_file():
            file.chmod(allowed)  # safetensors writes for the owner alone
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if directory.exists():
        directory.rename(_old(directory))
    try:
        partial.rename(directory)
    except OSError:
        if _old(directory).exists():
            _old(directory).rename(directory)
        raise
    shutil.rmtree(_old(directory), ignore_errors=True)


def _umask() -> int:
    """The process's; the only way to read it is to set it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
