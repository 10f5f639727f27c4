"""Weights from disk into sharded arrays, each process reading the bytes of its own shards only.

Finding models is hub.py's work, writing them hf_write.py's; both are offered here too.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxtune.errors import ModelError, listing
from jaxtune.hf_write import check_target, write_model
from jaxtune.hub import resolve_model
from jaxtune.models.weights import Tree, Weight, leaves_with_path, map_tree
from jaxtune.quant.checkpoints import Stored
from jaxtune.quant.leaf import Quantized, parts_of
from jaxtune.quant.scheme import PLAIN, Quantizer
from jaxtune.safetensors_io import Index, SafetensorsSource

__all__ = [
    "WeightSource",
    "check_target",
    "check_weights",
    "load_params",
    "open_source",
    "resolve_model",
    "write_model",
]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ALIGNMENT = 64  # bytes; XLA's on a CPU
CHUNK_BYTES = 4 << 20  # of one read: what is held beside the arrays themselves

Bounds = tuple[tuple[int, int], ...]  # (start, stop) for each dimension
Progress = Callable[[str, int, int], None]  # (weight, bytes done, bytes in all)


class WeightSource(Protocol):
    """Weights on disk, under their Hugging Face keys."""

    where: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, key: str, index: Index) -> np.ndarray:
        """The part of a weight that `index`, a slice for each dimension, takes."""
        ...


def open_source(path: Path, tied: bool = False) -> WeightSource:
    """The weights of a Hugging Face directory or of a .gguf file. Only headers are read.

    tied: whether the model's head is its embedding, which a directory may then keep under the head's name alone.
    """
    if path.suffix == ".gguf":
        from jaxtune.gguf_io import GGUFSource

        return GGUFSource(path)
    return SafetensorsSource(path, {HEAD: EMBEDDING} if tied else {})


def load_params(
    source: WeightSource,
    weights: Tree,
    shardings: Tree,
    dtype: Any,
    progress: Progress | None = None,
    quantizer: Quantizer = PLAIN,
) -> Tree:
    """The arrays of every declared weight, in its sharding and in `dtype`, or the quantised leaf in its place.

    Raises:
        ModelError: before anything is read, weights that are missing, unknown or of another shape, all
            by name; while reading, a damaged file, or a weight with a number that is not finite.
    """
    held = map_tree(lambda weight: quantizer.stored(weight, source), weights)
    check_weights(source, weights, held)
    _check_tied_head(source, weights)
    type_of = lambda weight: jnp.dtype(quantizer.type_of(weight, dtype))  # noqa: E731
    total = sum(jax.tree.leaves(map_tree(lambda w, h, s: _bytes_of(w, h, s, type_of(w)), weights, held, shardings)))
    done = 0

    def tick(key: str, count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(key, done, total)

    def load(weight: Weight, stored: Stored | None, sharding: Sharding) -> Any:
        if stored is not None:
            return _load_stored(source, weight, stored, tick)
        return quantizer.loaded(weight, _load(source, weight, sharding, type_of(weight), tick))

    return map_tree(load, weights, held, shardings)


def check_weights(source: WeightSource, weights: Tree, held: Tree | None = None) -> None:
    """Every declared weight is there with its shape, and nothing else is.

    held: of weights that are quantised in the source, how they lie there.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    pairs = [] if held is None else [stored for _, stored in leaves_with_path(held)]
    for (_, weight), stored in zip_longest(leaves_with_path(weights), pairs):
        wanted |= dict.fromkeys(weight.keys, weight.shape) if stored is None else stored.tensors
    missing = [key for key in wanted if key not in source.shapes]
    wrong = [
        f"{key} is {list(source.shapes[key])}, expected {list(shape)}"
        for key, shape in wanted.items()
        if key in source.shapes and source.shapes[key] != shape
    ]
    unknown = [key for key in source.shapes if key not in wanted and not _known_extra(key)]
    problems = {"missing weights": missing, "unknown weights": unknown, "weights of another shape": wrong}
    lines = [f"{what} ({len(names)}): {listing(names)}" for what, names in problems.items() if names]
    if lines:
        raise ModelError(f"{source.where}: the weights are not those of its config\n  " + "\n  ".join(lines))


def _known_extra(key: str) -> bool:
    """A tied model may carry its head, and old files carry rotary frequencies; the model makes its own."""
    return key == HEAD or key.endswith(".rotary_emb.inv_freq")


def _check_tied_head(source: WeightSource, weights: Tree) -> None:
    """A head beside a tied embedding must be the same numbers; otherwise the config is wrong about tying."""
    declared = {key for _, weight in leaves_with_path(weights) for key in weight.keys}
    if HEAD in declared or HEAD not in source.shapes:
        return
    same = source.shapes[HEAD] == source.shapes[EMBEDDING] and all(
        np.array_equal(source.read(HEAD, rows), source.read(EMBEDDING, rows))
        for rows in _row_chunks(source.shapes[HEAD], 4)
    )
    if not same:
        raise ModelError(
            f"{source.where}: {HEAD} differs from {EMBEDDING}, but config.json ties them;"
            " set tie_word_embeddings to false in config.json"
        )


def _load(source: WeightSource, weight: Weight, sharding: Sharding, dtype: np.dtype, tick: Callable) -> jax.Array:
    """One leaf."""
    return _array(weight.full_shape, sharding, lambda bounds: _read_part(source, weight, bounds, dtype, tick))


def _load_stored(source: WeightSource, weight: Weight, stored: Stored, tick: Callable) -> Quantized:
    """One leaf that is quantised in the source."""

    def load(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        def read(bounds: Bounds) -> np.ndarray:
            part = _aligned([stop - start for start, stop in bounds], shape.dtype)
            index = tuple(slice(*cut) for cut in bounds[1:])
            for row, key in enumerate(weight.keys[slice(*bounds[0])]):
                part[row] = _finite(source, key, stored.read(source, name, key, index))
                tick(key, part[row].nbytes)
            return part

        return _array(shape.shape, shape.sharding, read)

    parts = {name: load(name, shape) for name, shape in parts_of(stored.leaf).items()}
    return replace(stored.leaf, **parts)  # type: ignore[type-var]


def _array(shape: tuple[int, ...], sharding: Sharding, read: Callable[[Bounds], np.ndarray]) -> jax.Array:
    """An array from its parts. Devices that hold the same part share one read of it."""
    parts: dict[Bounds, np.ndarray] = {}

    def part(index: Index) -> np.ndarray:
        bounds = _bounds(index, shape)
        if bounds not in parts:
            parts[bounds] = read(bounds)
        return parts[bounds]

    # Waiting here frees the numpy buffers before those of the next array are made.
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part))


def _bounds(index: Index, shape: tuple[int, ...]) -> Bounds:
    return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))


def _bytes_of(weight: Weight, stored: Stored | None, sharding: Sharding, dtype: np.dtype) -> int:
    """The bytes that this process makes of a weight's parts, each once."""
    if stored is None:
        return _local_bytes(weight.full_shape, sharding, dtype)
    return sum(_local_bytes(part.shape, part.sharding, part.dtype) for part in parts_of(stored.leaf).values())


def _local_bytes(shape: tuple[int, ...], sharding: Sharding, dtype: np.dtype) -> int:
    indices = sharding.addressable_devices_indices_map(shape).values()
    parts = {_bounds(index, shape) for index in indices}
    return dtype.itemsize * sum(int(np.prod([stop - start for start, stop in part])) for part in parts)


def _read_part(source: WeightSource, weight: Weight, bounds: Bounds, dtype: np.dtype, tick: Callable) -> np.ndarray:
    result = _aligned([stop - start for start, stop in bounds], dtype)
    if weight.layers is None:
        _fill(result, source, weight.key, bounds, tick)
        return result
    layers = weight.keys[slice(*bounds[0])]
    for row, key in zip(result, layers, strict=True):
        _fill(row, source, key, bounds[1:], tick)
    return result


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address that a CPU device uses as it is: no second copy, whose pages would count too."""
    num_bytes = dtype.itemsize * int(np.prod(shape))
    raw: np.ndarray = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _fill(target: np.ndarray, source: WeightSource, key: str, bounds: Bounds, tick: Callable) -> None:
    """Read a part of one weight into `target`, a piece at a time."""
    start = bounds[0][0]
    rest = tuple(slice(*cut) for cut in bounds[1:])
    for (rows,) in _row_chunks(target.shape, 4):
        piece = source.read(key, (slice(start + rows.start, start + rows.stop), *rest))
        if not jnp.issubdtype(piece.dtype, jnp.floating):
            raise ModelError(f"{source.where}: {key} holds {piece.dtype} numbers, and its config says nothing of that")
        target[rows] = _finite(source, key, piece)
        tick(key, target[rows].nbytes)


def _finite(source: WeightSource, key: str, piece: np.ndarray) -> np.ndarray:
    if not np.isfinite(piece).all():
        raise ModelError(f"{source.where}: {key} has numbers that are not finite (NaN or infinity); get a sound copy")
    return piece


def _row_chunks(shape: tuple[int, ...], itemsize: int) -> list[tuple[slice]]:
    """Slices of axis 0 whose pieces have about CHUNK_BYTES."""
    row_bytes = max(1, itemsize * int(np.prod(shape[1:])))
    step = max(1, CHUNK_BYTES // row_bytes)
    return [(slice(start, min(start + step, shape[0])),) for start in range(0, shape[0], step)]
