"""The tensors of PEFT's `adapter_model.safetensors` by name, and the reading of them into the tree.

Source of the names and shapes: files that peft 0.21 writes. Strict both ways: every tensor of the file is used,
every place in the tree is filled. Pickled files are refused by name and never opened.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxtune.errors import AdapterError, listing, nearest
from jaxtune.files import inside
from jaxtune.models.weights import Path, Tree, map_tree, set_path
from jaxtune.tune.method import EMBEDDING, HEAD, declared, get_path, is_abstract, is_concrete, make
from jaxtune.tune.names import module_of
from jaxtune.tune.peft_config import CONFIG_NAME
from jaxtune.tune.plan import Plan, Site

TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
TIED_HEAD = "lm_head.weight"  # a file may hold a tied model's embedding under this name too
COPIES = (".base_layer.", ".original_module.", ".")  # how PEFT names a base weight that it stores beside an adapter

Index = tuple[slice, ...]
Parts = dict[Path, dict[str, Any]]  # of each adapted weight: the arrays a, b and scale


@dataclass(frozen=True)
class Entry:
    """One tensor of the file, and the array in the tree whose numbers it has.

    row: along axis 0 of the array; None where it has no layers. part: a | b of an adapter, which the file has
    transposed; None for a weight that trains whole.
    """

    key: str
    shape: tuple[int, ...]
    path: Path
    row: int | None
    part: str | None


def entries(plan: Plan, weights: Tree) -> list[Entry]:
    """Every tensor that an adapter file of this plan holds, no more and no less."""
    result = [entry for site in plan.sites.values() for entry in _site_entries(site)]
    for path, weight in declared(weights):
        for row, key in enumerate(weight.keys):
            if key in plan.trained:
                name = f"{module_of(key)}.base_layer.bias" if key in plan.biases else key
                result.append(Entry(PREFIX + name, weight.shape, path, None if weight.layers is None else row, None))
    return result


def _site_entries(site: Site) -> Iterator[Entry]:
    a_name, b_name = (
        ("lora_embedding_A", "lora_embedding_B") if site.is_embedding else ("lora_A.weight", "lora_B.weight")
    )
    in_size, out_size = site.in_out
    for row, (module, rank) in enumerate(zip(site.modules, site.ranks)):
        axis = None if site.weight.layers is None else row
        if rank:
            yield Entry(f"{PREFIX}{module}.{a_name}", (rank, in_size), site.path, axis, "a")
            yield Entry(f"{PREFIX}{module}.{b_name}", (out_size, rank), site.path, axis, "b")


@dataclass(frozen=True)
class AdapterFile:
    """The tensors of an adapter directory, read by byte range."""

    path: FilePath
    shapes: dict[str, tuple[int, ...]]
    handle: Any

    def read(self, key: str, index: Index = (slice(None),)) -> np.ndarray:
        """A slice of a tensor, in the file's dtype."""
        return self.handle.get_slice(key)[index]


def open_adapter(directory: str | FilePath) -> AdapterFile:
    """The tensors of an adapter directory; of the file only the header is read.

    Raises:
        AdapterError: no such file, only a pickled one, or not safetensors.
    """
    path = FilePath(directory) / TENSORS_NAME
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        if pickled.exists():
            raise AdapterError(
                f"{pickled}: a pickled file can run any code and is never opened; load it with peft and save it "
                f"again, which writes {TENSORS_NAME}"
            )
        raise AdapterError(f"{path}: missing; an adapter directory has {CONFIG_NAME} and {TENSORS_NAME}")
    try:
        handle = safe_open(inside(path.parent, path.name, AdapterError, str(directory)), framework="np")
        return AdapterFile(path, {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}, handle)  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a safetensors file: {error}") from None


def read_adapter(
    directory: str, plan: Plan, weights: Tree, params: Tree, shardings: dict[Path, dict[str, Any]] | None
) -> tuple[Tree, Parts]:
    """(params with the weights that train whole taken from the adapter, the parts of each adapted weight).

    Each process reads the bytes of its own shards. Without values in `params` only names and shapes are checked.

    Raises:
        AdapterError: a tensor too many, too few or of another shape, or one made for another base.
    """
    file = open_adapter(directory)
    wanted = entries(plan, weights)
    copies = _check_names(file, wanted, weights)
    if not is_concrete(params):
        zeros = lambda: {path: _zeros(site) for path, site in plan.sites.items()}  # noqa: E731
        return params, make(zeros, shardings, is_abstract(params))
    for key, path, row in copies:
        _check_copy(file, key, get_path(params, path), row)
    parts = {path: _read_parts(file, wanted, site, shardings) for path, site in plan.sites.items()}
    return _read_whole(file, wanted, params), parts


def _zeros(site: Site) -> dict[str, jax.Array]:
    return {name: jnp.zeros(part.shape) for name, part in site.parts.items()}


def _read_parts(file: AdapterFile, wanted: list[Entry], site: Site, shardings) -> dict[str, jax.Array]:
    result = {}
    for name, part in site.parts.items():
        sharding = None if shardings is None else shardings[site.path][name]
        if name == "scale":
            scales = np.array(site.scales, np.float32).reshape(part.shape)
            result[name] = _place(part.shape, sharding, scales.__getitem__)
        else:
            mine = [entry for entry in wanted if entry.path == site.path and entry.part == name]
            result[name] = _place(part.shape, sharding, _reader(file, mine, part.shape))
    return result


def _read_whole(file: AdapterFile, wanted: list[Entry], params: Tree) -> Tree:
    result = map_tree(lambda array: array, params)
    for path in dict.fromkeys(entry.path for entry in wanted if entry.part is None):
        array, mine = get_path(params, path), [entry for entry in wanted if entry.path == path]
        set_path(result, path, _place(array.shape, array.sharding, _reader(file, mine, array.shape)))
    return result


def _place(shape: tuple[int, ...], sharding: Any, read: Callable[[Index], np.ndarray]) -> jax.Array:
    if sharding is None:
        return jnp.asarray(read(tuple(slice(None) for _ in shape)))
    return jax.make_array_from_callback(shape, sharding, read)


def _reader(file: AdapterFile, mine: list[Entry], shape: tuple[int, ...]) -> Callable[[Index], np.ndarray]:
    """A function from an index into an array of the tree to its numbers in float32; zero where no tensor has any."""

    def read(index: Index) -> np.ndarray:
        ranges = [range(size)[part] for part, size in zip(index, shape)]
        out: np.ndarray = np.zeros([len(part) for part in ranges], np.float32)
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
    ordered = ranges if entry.part is None else ranges[::-1]
    bounds = [(part.start, min(part.stop, size)) for part, size in zip(ordered, entry.shape)]
    if any(start >= stop for start, stop in bounds):
        return np.zeros([0] * len(bounds), np.float32)
    value: np.ndarray = file.read(entry.key, tuple(slice(*bound) for bound in bounds)).astype(np.float32)
    if not np.isfinite(value).all():
        raise AdapterError(f"{file.path}: {entry.key} has numbers that are not finite (NaN or infinity)")
    return value if entry.part is None else value.T


def _check_names(file: AdapterFile, wanted: list[Entry], weights: Tree) -> list[tuple[str, Path, int | None]]:
    """The tensors that are copies of base weights, as (key in the file, path, row); any other surplus is an error."""
    expected = {entry.key: entry.shape for entry in wanted}
    missing = [key for key in expected if key not in file.shapes]
    if missing:
        raise AdapterError(f"{file.path}: missing tensors ({len(missing)}): {listing(missing)}")
    known = _base_keys(weights)
    copies, unknown = [], []
    for key in sorted(file.shapes.keys() - expected.keys()):
        name = _base_name(key, known)
        if name is not None:
            copies.append((key, *known[name][:2]))
            expected[key] = known[name][2]
        elif _alias(key) in expected:
            expected[key] = expected[_alias(key)]
            _check_alias(file, key)
        else:
            unknown.append(key)
    if unknown:
        hint = nearest(unknown[0], expected)
        raise AdapterError(
            f"{file.path}: tensors without a place in the model ({len(unknown)}): {listing(unknown)}{hint}"
        )
    wrong = [
        f"{key} {file.shapes[key]}, expected {shape}" for key, shape in expected.items() if file.shapes[key] != shape
    ]
    if wrong:
        raise AdapterError(f"{file.path}: tensors of another shape than the model's ({len(wrong)}): {listing(wrong)}")
    return copies


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


def _alias(key: str) -> str:
    """PEFT stores the bias of a module to save a second time, with this word in its name."""
    return key.replace(".modules_to_save.", ".")


def _check_alias(file: AdapterFile, key: str) -> None:
    if not np.array_equal(file.read(key), file.read(_alias(key))):
        raise AdapterError(f"{file.path}: {key} and {_alias(key)} differ; they are the same weight")


def _check_copy(file: AdapterFile, key: str, array: jax.Array, row: int | None) -> None:
    """A base weight in the file is what the adapter was made for; the model's must be the same."""
    base = array if row is None else array[row]
    stored = _place(base.shape, base.sharding, lambda index: file.read(key, index).astype(base.dtype))
    if not bool(jnp.array_equal(stored, base)):
        raise AdapterError(
            f"{file.path}: {key} is not the model's weight of that name; the adapter was made for another base model"
        )
