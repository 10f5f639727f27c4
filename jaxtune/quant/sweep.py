"""A model taken through its layers one after another: calibration data in, one layer's weights in memory at a time.

Of each batch two hidden states go along: what the original layers make of it, and what the new layers make of it.
What a linear map is quantised for is its inputs in the new model, of which all before it is quantised already.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import ops
from jaxtune.data.loader import Dataset
from jaxtune.errors import ModelError
from jaxtune.hf_io import WeightSource
from jaxtune.leaves import Leaf
from jaxtune.loss import cross_entropy
from jaxtune.models.decoder import NO_WINDOW, Model
from jaxtune.models.weights import Path, Tree, Weight, map_tree, set_path

# The linear maps of a layer, in the order in which they are computed; those of one row have the same inputs.
ORDER = (
    tuple(("attention", name, "weight") for name in ("q_proj", "k_proj", "v_proj")),
    (("attention", "o_proj", "weight"),),
    tuple(("mlp", name, "weight") for name in ("gate_proj", "up_proj")),
    (("mlp", "down_proj", "weight"),),
)

Change = Callable[[str, jax.Array, jax.Array | None], jax.Array]  # (key, weight, X^T X of its inputs) -> new weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Watched(Leaf):
    """A weight that tells of its inputs while a layer is traced. It lives inside one trace."""

    base: Any
    tell: Callable[[jax.Array], None] = field(metadata={"static": True})

    def product(self, inputs: tuple[Any, ...], split: str | None) -> Any:
        self.tell(inputs[0])
        return ops.product(inputs, self.base, split)


@dataclass
class Stream:
    """Rows of data and their hidden states, by batch: in the original model and in the new one."""

    batches: list[dict[str, jax.Array]]
    original: list[jax.Array] = field(default_factory=list)
    new: list[jax.Array] = field(default_factory=list)

    @classmethod
    def of(cls, data: Dataset, samples: int) -> "Stream":
        """The first `samples` rows, or as many as there are."""
        rows = min(samples, data.rows)
        size = data.batch_size
        parts = [data.batch(1 + start // size).arrays() for start in range(0, rows, size)]
        cut = [min(size, rows - start) for start in range(0, rows, size)]
        return cls([{name: jnp.asarray(x[0, :n]) for name, x in part.items()} for part, n in zip(parts, cut)])


class Sweep:
    """What is needed of a model to take it through layer by layer; all is computed in float32."""

    def __init__(self, model: Model, source: WeightSource):
        self.model, self.source = model, source
        self._declared = map_tree(lambda weight: replace(weight, layers=None), model.weights["stacks"]["0"])
        self._embed = jax.jit(partial(model.embed, dtype=jnp.float32))
        self._forward = jax.jit(partial(_layer, model))
        self._gram = jax.jit(partial(_gram, model), static_argnames="path")
        self._loss = jax.jit(partial(_loss, model))

    def start(self, streams: list[Stream]) -> None:
        """Hidden states before the first layer."""
        params = self._ends("embed")
        for stream in streams:
            stream.original = [self._embed(params, batch["tokens"]) for batch in stream.batches]
            stream.new = list(stream.original)

    def layer(self, number: int, streams: list[Stream], change: Change, needs_inputs: bool) -> float | None:
        """Take one layer's maps through `change`, and every stream through the layer.

        streams: the first is what maps are quantised for. Returns how far its outputs of the layer are now from the
        original model's, as a share of their size; None: there is no stream.
        """
        old = self.read(number)
        new = map_tree(lambda array: array, old)
        window = self._window(number)
        for paths in ORDER:
            gram = self._total(new, paths[0], streams[0], window) if needs_inputs else None
            for path in paths:
                set_path(new, path, change(self._weight(path).key.format(layer=number), _at(new, path), gram))
        for stream in streams:
            for index, batch in enumerate(stream.batches):
                stream.original[index] = self._forward(old, stream.original[index], batch, window)
                stream.new[index] = self._forward(new, stream.new[index], batch, window)
        return _distance(streams[0]) if streams else None

    def perplexity(self, stream: Stream) -> tuple[float, float]:
        """exp of the mean loss of the supervised tokens: of the original model, and of the new one."""
        params = self._ends("embed", "norm", "head")
        return tuple(self._perplexity(params, states, stream.batches) for states in (stream.original, stream.new))  # type: ignore[return-value]

    def _perplexity(self, params: Tree, states: list[jax.Array], batches: list[dict[str, jax.Array]]) -> float:
        losses = [self._loss(params, x, batch) for x, batch in zip(states, batches, strict=True)]
        tokens = sum(int(batch["mask"].sum()) for batch in batches)
        return float(np.exp(sum(map(float, losses)) / tokens))

    def read(self, number: int) -> Tree:
        """The weights of one layer, in float32."""
        return map_tree(lambda weight: self._load(weight.key.format(layer=number), weight.shape), self._declared)

    def _weight(self, path: Path) -> Weight:
        return _at(self._declared, path)

    def _ends(self, *names: str) -> Tree:
        """What is in no layer, as far as it is there: a tied model has no head."""
        trees = {name: self.model.weights[name] for name in names if name in self.model.weights}
        return map_tree(lambda weight: self._load(weight.key, weight.shape), trees)

    def _load(self, key: str, shape: tuple[int, ...]) -> jax.Array:
        array = self.source.read(key, tuple(slice(0, size) for size in shape))
        if not np.isfinite(array).all():
            raise ModelError(f"{self.source.where}: {key} has numbers that are not finite; get a sound copy")
        return jnp.asarray(array, jnp.float32)

    def _window(self, number: int) -> jax.Array | None:
        windows = self.model.config.windows
        return jnp.int32(windows[number] or NO_WINDOW) if any(windows) else None

    def _total(self, params: Tree, path: Path, stream: Stream, window: jax.Array | None) -> jax.Array:
        """X^T X over all batches."""
        pairs = zip(stream.new, stream.batches, strict=True)
        return reduce(jnp.add, (self._gram(params, x, batch, window, path=path) for x, batch in pairs))


def _at(tree: Tree, path: Path) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _layer(model: Model, params: Tree, x_BTE: jax.Array, batch: dict[str, jax.Array], window: Any) -> jax.Array:
    context, _ = model.context({}, batch["tokens"], batch["positions"], batch["segments"])
    block = nnx.merge(model.block, nnx.State(params))
    return block(x_BTE, context, window, None, None, {})[0]


def _gram(model: Model, params: Tree, x: jax.Array, batch: dict[str, jax.Array], window: Any, path: Path) -> jax.Array:
    """X^T X of the inputs of the map at `path`, padding left out."""
    told: list[jax.Array] = []
    watched = map_tree(lambda array: array, params)
    set_path(watched, path, Watched(_at(params, path), told.append))
    _layer(model, watched, x, batch, window)  # what comes after the map is not computed
    (inputs,) = told
    rows = jnp.where(batch["segments"][..., None] > 0, inputs, 0).reshape(-1, inputs.shape[-1])
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


def _loss(model: Model, params: Tree, x: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The sum of the losses of the supervised tokens."""
    hidden = model.final(params, x)
    return cross_entropy(hidden, model.head(params, hidden.dtype), batch["targets"], batch["mask"])


def _distance(stream: Stream) -> float:
    apart, size = 0.0, 0.0
    for old, new, batch in zip(stream.original, stream.new, stream.batches, strict=True):
        real = batch["segments"][..., None] > 0
        apart += float(jnp.sum(jnp.where(real, new - old, 0) ** 2))
        size += float(jnp.sum(jnp.where(real, old, 0) ** 2))
    return float(np.sqrt(apart / size))
