"""The tensors of PEFT's `adapter_model.safetensors` by name, and the reading of them into the tree.

Source of the names and shapes: files that peft 0.21 writes. Strict both ways: every tensor of the file is used,
every place in the tree is filled. Pickled files are refused by name and never opened.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxtune.errors import AdapterError, listing, nearest
from jaxtune.files import check_readable, expanded, inside, read_json
from jaxtune.leaves import Leaf
from jaxtune.models.weights import Path, Tree, map_tree, set_path
from jaxtune.tune.method import EMBEDDING, HEAD, declared, get_path, is_concrete
from jaxtune.tune.peft_config import CONFIG_NAME
from jaxtune.tune.peft_files import PREFIX, TENSORS_NAME, Entry, Files

PICKLED = ("adapter_model.bin", "pytorch_adapter.bin")  # PEFT's and AdapterHub's
TIED_HEAD = "lm_head.weight"  # a file may hold a tied model's embedding under this name too
ROUNDING = 1e-2  # a matmul's, in the narrowest type that a device may take for float32
COPIES = (".base_layer.", ".original_module.", ".")  # how PEFT names a base weight that it stores beside an adapter

Index = tuple[slice, ...]


@dataclass(frozen=True)
class AdapterFile:
    """The tensors of an adapter directory, read by byte range."""

    path: FilePath
    shapes: dict[str, tuple[int, ...]]
    handle: Any

    def read(self, key: str, index: Any = (slice(None),)) -> np.ndarray:
        """A slice of a tensor, in the file's dtype."""
        return self.handle.get_slice(key)[index]


def open_adapter(directory: str | FilePath, name: str = TENSORS_NAME) -> AdapterFile:
    """The tensors of an adapter directory; of the file only the header is read.

    Raises:
        AdapterError: no such file, only a pickled one, or not safetensors.
    """
    path = expanded(directory) / name
    if not path.is_file():
        pickled = [path.with_name(file) for file in PICKLED if path.with_name(file).exists()]
        if pickled:
            raise AdapterError(
                f"{pickled[0]}: a pickled file can run any code and is never opened; load it with the library that "
                f"wrote it and save it again as safetensors, in {name}"
            )
        raise AdapterError(f"{path}: missing; an adapter directory has {CONFIG_NAME} and {name}")
    file = inside(path.parent, path.name, AdapterError, str(directory))
    check_readable(file, AdapterError)
    try:
        handle = safe_open(file, framework="np")
        return AdapterFile(path, {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}, handle)  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a safetensors file: {error}") from None


@dataclass(frozen=True)
class Checked:
    """An adapter's tensors, each with its place in a tree. copies: of base weights, (key in the file, path, row).

    check: of the tree that has them, raising AdapterError.
    """

    file: AdapterFile
    wanted: list[Entry]
    copies: list[tuple[str, Path, int | None]]
    fill: dict[str, float]
    check: Callable[[Tree], None] = lambda params: None

    def put_into(self, params: Tree) -> Tree:
        """`params`, whose leaves the method has put in place, with every number that the adapter has.

        Each process reads the bytes of its own shards. A tree without values stays as it is.

        Raises:
            AdapterError: the adapter was made for another base, or has a number that is not finite.
        """
        if not is_concrete(params):
            return params
        for key, path, row in self.copies:
            _check_copy(self.file, key, _bottom(get_path(params, path)), row)
        result = map_tree(lambda leaf: leaf, params)
        for path, part in dict.fromkeys((entry.path, entry.part) for entry in self.wanted):
            leaf = get_path(result, path)
            array = leaf if part is None else getattr(leaf, part)
            mine = [entry for entry in self.wanted if (entry.path, entry.part) == (path, part)]
            value = _place(
                array.shape, array.sharding, _reader(self.file, mine, array.shape, self.fill.get(part or "", 0.0))
            )
            set_path(result, path, _with_others(value, array, mine) if part is None else replace(leaf, **{part: value}))
        self.check(result)
        return result


def open_checked(directory: str, files: Files, section: Any, weights: Tree) -> Checked:
    """The tensors of an adapter directory for a model; only names and shapes are read.

    Raises:
        AdapterError: a tensor too many, too few or of another shape.
    """
    derived, wanted = files.derived(section), files.entries(section, weights)
    if derived is None:
        file = open_adapter(directory, files.tensors_name)
        return Checked(file, wanted, _check_names(file, wanted, weights, files.alias), files.fill)
    file, made = open_adapter(directory, derived.file), open_adapter(directory)
    check = partial(_check_derived, file.path, made, partial(derived.tensors, section))
    return Checked(file, wanted, _check_names(file, wanted, weights, files.alias), files.fill, check)


def _check_derived(source: FilePath, file: AdapterFile, tensors: Callable[[Tree], dict[str, Any]], tree: Tree) -> None:
    """What PEFT's file has is what the weights in ours give, but for another machine's rounding."""
    for key, array in tensors(tree).items():
        fits = file.shapes.get(key) == array.shape
        if not fits or not bool(jnp.allclose(array, file.read(key, ...), 0, ROUNDING * float(jnp.max(jnp.abs(array))))):
            raise AdapterError(
                f"{file.path}: {key} is not what {source.name} gives; the two belong to different adapters. Without "
                f"{source.name} the adapter loads as PEFT has it"
            )


def _bottom(leaf: Any) -> Any:
    """The array under the leaves; None where it has another form, in which nothing can be compared."""
    while isinstance(leaf, Leaf):
        leaf = None if leaf.REBASED else getattr(leaf, "base", None)
    return leaf


def _with_others(value: jax.Array, before: jax.Array, mine: list[Entry]) -> jax.Array:
    """A weight of the model that trains whole in some layers: those that the file does not have stay as they were."""
    rows = [entry.row for entry in mine]
    if None in rows or len(rows) == len(before):
        return value
    has = np.isin(np.arange(len(before)), rows).reshape(-1, *[1] * (before.ndim - 1))
    return jnp.where(has, value, before)


def _place(shape: tuple[int, ...], sharding: Any, read: Callable[[Index], np.ndarray]) -> jax.Array:
    return jax.make_array_from_callback(shape, sharding, read)


def _reader(file: AdapterFile, mine: list[Entry], shape: tuple[int, ...], fill: float) -> Callable[[Index], np.ndarray]:
    """A function from an index into an array of the tree to its numbers in float32; `fill` where no tensor has any."""

    def read(index: Index) -> np.ndarray:
        ranges = [range(size)[part] for part, size in zip(index, shape)]
        out: np.ndarray = np.full([len(part) for part in ranges], fill, np.float32)
        for entry in mine:
            if entry.row is not None and entry.row not in ranges[0]:
                continue
            inner = ranges if entry.row is None else ranges[1:]
            target = out if entry.row is None else out[ranges[0].index(entry.row)]
            value = _read_slice(file, entry, inner)
            target[tuple(slice(size) for size in value.shape)] = value
        return out

    return read


def _read_slice(file: AdapterFile, entry: Entry, ranges: list[range]) -> np.ndarray:
    """The part of a tensor that lies in the ranges of the tree's array; a smaller rank ends before they do."""
    bounds = _bounds(entry, ranges)
    if any(start >= stop for start, stop in bounds):
        return np.zeros([0] * len(ranges), np.float32)
    index = tuple(slice(*bound) for bound in bounds)
    value: np.ndarray = file.read(entry.key, index[::-1] if entry.turned else index).astype(np.float32)
    if not np.isfinite(value).all():
        raise AdapterError(f"{file.path}: {entry.key} has numbers that are not finite (NaN or infinity)")
    value = value.T if entry.turned else value
    return value if value.ndim == len(ranges) else value.reshape([len(part) for part in ranges])


def _bounds(entry: Entry, ranges: list[range]) -> list[tuple[int, int]]:
    """What to read of each dimension of a tensor, in the array's order of dimensions."""
    shape = entry.shape[::-1] if entry.turned else entry.shape
    if len(shape) > len(ranges):  # by dimensions of size 1
        left = iter(ranges)
        ranges = [range(1) if size == 1 else next(left) for size in shape]
    if len(shape) < len(ranges):  # the last of the tensor is several of the array, whole but for the first of them
        first, *inner = ranges[len(shape) - 1 :]
        size = math.prod(len(part) for part in inner)
        ranges = [*ranges[: len(shape) - 1], range(first.start * size, first.stop * size)]
    bounds = [(part.start, min(part.stop, size)) for part, size in zip(ranges, shape)]
    if entry.columns is not None:
        first_column, end = entry.columns
        bounds[-1] = (first_column + ranges[-1].start, min(first_column + ranges[-1].stop, end))
    return bounds


def _check_names(
    file: AdapterFile, wanted: list[Entry], weights: Tree, alias: Callable[[str], str]
) -> list[tuple[str, Path, int | None]]:
    """The tensors that are copies of base weights, as (key in the file, path, row); any other surplus is an error."""
    expected = {entry.key: entry.shape for entry in wanted}
    missing = [key for key in expected if key not in file.shapes]
    if missing:
        raise AdapterError(
            f"{file.path}: missing tensors ({len(missing)}): {listing(missing)}{_made_for(file, expected)}"
        )
    known = _base_keys(weights)
    copies, unknown = [], []
    for key in sorted(file.shapes.keys() - expected.keys()):
        name = _base_name(key, known)
        if name is not None:
            copies.append((key, *known[name][:2]))
            expected[key] = known[name][2]
        elif (other := alias(_saved_once(key))) in expected:
            expected[key] = expected[other]
            _check_alias(file, key, other)
        else:
            unknown.append(key)
    if unknown:
        hint = nearest(unknown[0], expected) if len(unknown) == 1 else ""
        raise AdapterError(
            f"{file.path}: tensors without a place in the model ({len(unknown)}): {listing(unknown)}{hint}"
            f"{_made_for(file, expected)}"
        )
    wrong = [
        f"{key} {file.shapes[key]}, expected {shape}" for key, shape in expected.items() if file.shapes[key] != shape
    ]
    if wrong:
        raise AdapterError(
            f"{file.path}: tensors of another shape than the model's ({len(wrong)}): {listing(wrong)}"
            f"{_made_for(file, expected)}"
        )
    return copies


def _made_for(file: AdapterFile, expected: Iterable[str]) -> str:
    """What an adapter's own settings say of the model that it fits, for whom it does not fit."""
    settings = file.path.with_name(CONFIG_NAME)
    base = read_json(settings, AdapterError).get("base_model_name_or_path") if settings.is_file() else None
    theirs, ours = _layers(file.shapes), _layers(expected)
    counts = f"\nIt has tensors for {theirs} layers, the model has places in {ours}" if theirs != ours else ""
    return f"{counts}\n{settings.name} says that it was made for {base}" if base else counts


def _layers(keys: Iterable[str]) -> int:
    return len({found[0] for key in keys if (found := re.search(r"\.layers\.\d+\.", key))})


def _base_keys(weights: Tree) -> dict[str, tuple[Path, int | None, tuple[int, ...]]]:
    """Hugging Face key -> (path, row, shape) of every weight."""
    known = {}
    for path, weight in declared(weights):
        for row, key in enumerate(weight.keys):
            known[key] = (path, None if weight.layers is None else row, weight.shape)
    if get_path(weights, HEAD) is None:
        known[TIED_HEAD] = known[get_path(weights, EMBEDDING).key]
    return known


def _base_name(key: str, known: dict) -> str | None:
    """The Hugging Face key of the base weight that a tensor is a copy of."""
    plain = key.removeprefix(PREFIX)
    for infix in COPIES if key.startswith(PREFIX) else ():
        name = plain.replace(infix, ".")
        if name in known:
            return name
    return None


def _saved_once(key: str) -> str:
    """PEFT stores the bias of a module to save a second time, with this word in its name."""
    return key.replace(".modules_to_save.", ".")


def _check_alias(file: AdapterFile, key: str, other: str) -> None:
    if not np.array_equal(file.read(key), file.read(other)):
        raise AdapterError(f"{file.path}: {key} and {other} differ; they are the same weight")


def _check_copy(file: AdapterFile, key: str, array: jax.Array | None, row: int | None) -> None:
    """A base weight in the file is what the adapter was made for; the model's must be the same."""
    if array is None:
        return
    base = array if row is None else array[row]

    def read(index: Index) -> np.ndarray:
        part = file.read(key, index)
        return part.astype(base.dtype) if part.dtype.itemsize > base.dtype.itemsize else part

    stored = _place(base.shape, base.sharding, read)
    if not bool(jnp.isfinite(stored).all()):
        raise AdapterError(f"{file.path}: {key} has numbers that are not finite (NaN or infinity)")
    if not are_one_weight(stored, base):
        raise AdapterError(
            f"{file.path}: {key} is not the model's weight of that name; the adapter was made for another base model"
        )


def are_one_weight(a: Any, b: Any) -> bool:
    """Whether two arrays, of JAX or of numpy, are one weight in their types: one is the other, rounded. PEFT stores the
    weight in the type in which it held the model, whatever the type of the model's files."""
    if bool((a == b.astype(a.dtype)).all()) or bool((b == a.astype(b.dtype)).all()):
        return True
    if {a.dtype.name, b.dtype.name} != {"bfloat16", "float16"}:
        return False
    # Neither of the two has all numbers of the other: both may be roundings of a float32.
    a, b = a.astype(np.float32), b.astype(np.float32)
    step, smallest = float(jnp.finfo(jnp.bfloat16).eps), float(jnp.finfo(jnp.float16).smallest_subnormal)
    return bool((abs(a - b) <= step * abs(a) + smallest).all())
