"""A checkpoint whose layers lie in other stacks than the run's: its arrays put together anew.

Over a pipeline there is one stack of layers; without one there is one for each run of layers that train the same
weights (tune.layout). Layers of which nothing trains are in no checkpoint then: over a pipeline they keep what they
start with. Which of the two a checkpoint is shows in the names and shapes of its arrays. A model that is loaded to
draw tokens may have every layer apart; no checkpoint is of that kind.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from operator import ne
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxtune import tune
from jaxtune.checkpoint import Arrays, by_path
from jaxtune.errors import CheckpointError
from jaxtune.models.config import ModelConfig
from jaxtune.models.weights import Tree
from jaxtune.parallel import local
from jaxtune.section import TuneSection

NUMBER = re.compile(r"(?<=\bstacks/)\d+(?=/)")  # of a stack, in a path
Stacks = tuple[range, ...]  # the layers of each, as Model has them
Cut = tuple[str | None, int, int]  # rows, from one to another, of an array there; None: of the first values


@dataclass(frozen=True)
class Move:
    """The way from what a checkpoint has to what is wanted of it.

    wanted: shapes with shardings. cuts: what each stacked array is made of, by its path; none where the checkpoint has
    the arrays as they are wanted. pieces: the shapes of what is cut.
    """

    wanted: Tree
    cuts: dict[str, tuple[Cut, ...]] = field(default_factory=dict)
    pieces: Arrays = field(default_factory=dict)

    @property
    def needed(self) -> Tree:
        """What to read of the checkpoint."""
        if not self.cuts:
            return self.wanted
        return {path: shape for path, shape in by_path(self.wanted).items() if path not in self.cuts} | self.pieces

    @property
    def gaps(self) -> set[str]:
        """The paths of the arrays of which the checkpoint has some layers only."""
        return {path for path, cuts in self.cuts.items() if any(name is None for name, _, _ in cuts)}

    def joined(self, found: Tree, first: Mapping[str, jax.Array]) -> Tree:
        """What is wanted, of what was read; that is given up. first: first values, by path, where there are gaps."""
        if not self.cuts:
            return found
        left = Counter(name for cuts in self.cuts.values() for name, _, _ in cuts if name is not None)
        result = []
        for path, shape in by_path(self.wanted).items():
            cuts = self.cuts.get(path, ())
            names = _names(cuts)
            parts = [first[path] if name is None else found[name] for name, _, _ in cuts]
            starts = np.array([start for _, start, _ in cuts], np.int32)
            join = _joiner(tuple(stop - start for _, start, stop in cuts), shape.shape[1:], shape.sharding)
            result.append(jax.block_until_ready(join(starts, *parts)) if cuts else found[path])
            left.subtract(names)
            for name in names:
                if not left[name]:
                    found[name].delete()
        return jax.tree.unflatten(jax.tree.structure(self.wanted), result)


def move(wanted: Tree, saved: Mapping[str, list], section: TuneSection, config: ModelConfig, own: Stacks) -> Move:
    """What is to be done with a checkpoint of the same run.

    wanted: as `Move` has it. saved: type and shape of each array of the checkpoint, by path. config: the base model's.
    own: the stacks of what is wanted. A checkpoint of neither kind is not moved: to read it is refused then.

    Raises:
        CheckpointError: the weights could be moved, but not the optimiser's 8-bit moments.
    """
    stacked = {path: shape for path, shape in by_path(wanted).items() if NUMBER.search(path)}
    if all(saved.get(path) == [shape.dtype.name, *shape.shape] for path, shape in stacked.items()):
        return Move(wanted)
    kinds: tuple[Stacks, ...] = tune.layout(section, config)[1], (range(config.num_layers),)
    for other in (kind for kind in kinds if kind != own):
        cuts = {path: _cuts(path, own, other, saved) for path in stacked}
        unlike = {path for path, shape in stacked.items() if not _movable(shape, cuts[path], other, saved)}
        if not unlike:
            return Move(wanted, cuts, _pieces(stacked, cuts, other, saved))
        if all(path.startswith("optimizer/") for path in unlike):
            raise CheckpointError(
                f"{min(unlike)}: the moments of optim.name adamw_8bit do not go from a run with mesh.pipe to one "
                "without it or back where layers have different ranks: their blocks are cut otherwise; leave mesh.pipe "
                "as it was"
            )
    return Move(wanted)


def _pieces(stacked: Arrays, cuts: dict[str, tuple[Cut, ...]], other: Stacks, saved: Mapping[str, list]) -> Arrays:
    """What to read of the stacks there."""
    return {
        name: jax.ShapeDtypeStruct((len(other[_number(name)]), *saved[name][2:]), shape.dtype, sharding=shape.sharding)
        for path, shape in stacked.items()
        for name in _names(cuts[path])
    }


def _movable(shape: jax.ShapeDtypeStruct, cuts: tuple[Cut, ...], other: Stacks, saved: Mapping[str, list]) -> bool:
    """Whether a stacked array can be made of its cuts."""
    names = _names(cuts)
    return bool(names) and all(name in saved and _fits(shape, len(other[_number(name)]), saved[name]) for name in names)


def _names(cuts: tuple[Cut, ...]) -> list[str]:
    return [name for name, _, _ in cuts if name is not None]


def _fits(shape: jax.ShapeDtypeStruct, layers: int, saved: list) -> bool:
    """Whether so many layers lie there, as large as here, or another rank is the largest in their stack: lower ones end
    in zeros."""
    sizes = list(shape.shape[1:])
    if saved[1] != layers:  # of the other kind of stacks, some of which have the same names
        return False
    if sizes == saved[2:] or len(sizes) != len(saved[2:]):
        return sizes == saved[2:]
    return jnp.issubdtype(shape.dtype, jnp.floating) and sum(map(ne, sizes, saved[2:])) == 1


def _cuts(path: str, own: Stacks, other: Stacks, saved: Mapping[str, list]) -> tuple[Cut, ...]:
    layers, result = own[_number(path)], []
    for number, there in enumerate(other):
        start, stop = max(layers.start, there.start), min(layers.stop, there.stop)
        if start < stop:
            name = NUMBER.sub(str(number), path)
            is_there = name in saved or _has_other_parts(name, saved)
            source, first = (name, there.start) if is_there else (None, layers.start)
            result.append((source, start - first, stop - first))
    return tuple(result)


def _has_other_parts(path: str, saved: Mapping[str, list]) -> bool:
    """Whether there is an array in 8 bits, which has two parts, where a whole one is wanted, or the other way round."""
    return path.rpartition("/")[0] in saved or any(name.startswith(f"{path}/") for name in saved)


def _number(path: str) -> int:
    found = NUMBER.search(path)
    assert found is not None
    return int(found[0])


@lru_cache(256)
def _joiner(rows: tuple[int, ...], sizes: tuple[int, ...], home: Sharding) -> Any:
    """What puts rows of arrays one after another; arrays that are cut alike, wherever, are compiled for once.

    rows: of each array, from a start of its own on. sizes: of a row. Of a longer one the rest is dropped, a shorter one
    ends in zeros.
    """

    def part(x: jax.Array, start: jax.Array, count: int) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(local.near(x), start, count)
        cut = own[(slice(None), *map(slice, sizes))]
        return jnp.pad(cut, [(0, 0), *((0, size - own) for size, own in zip(sizes, cut.shape[1:], strict=True))])

    def join(starts: jax.Array, *arrays: jax.Array) -> jax.Array:
        return jnp.concatenate([part(*cut) for cut in zip(arrays, starts, rows, strict=True)])

    return jax.jit(join, out_shardings=home)
