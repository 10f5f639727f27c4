"""The training state, made in its shards: what a step changes, and so what a checkpoint holds."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.float8 import NOTHING, Watch
from jaxtune.models.execution import HOST
from jaxtune.models.weights import Tree
from jaxtune.once import run_once
from jaxtune.optim import state_shardings
from jaxtune.parallel.layout import Layout
from jaxtune.step import init_state


def state_homes(shapes: Tree, layout: Layout, offload: tuple[str, ...] = ()) -> Tree:
    """The sharding of every array of a state: moments lie as `layout` splits them, counters everywhere.

    shapes: the state's, as jax.eval_shape gives them. offload: of optimizer and params, what lies on the host.
    """
    counters = {name: shapes[name] for name in ("guard", "spikes", "float8")}
    everywhere = jax.tree.map(lambda _: NamedSharding(layout.mesh, PartitionSpec()), counters)
    like_moments = partial(state_shardings, params=shapes["trainable"], shardings=layout.homes(layout.moments))
    moments = like_moments(shapes["optimizer"])
    if "optimizer" in offload:
        moments = jax.tree.map(lambda home: home.with_memory_kind(HOST), moments)
    trainable = layout.homes(layout.trainable, HOST if "params" in offload else None)
    own = {"method": like_moments(shapes["method"])} if "method" in shapes else {}
    return {"trainable": trainable, "optimizer": moments, **own, **everywhere}


def make_state(
    trainable: Tree,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    offload: tuple[str, ...] = (),
    scale: float = 1.0,
    watch: Watch = NOTHING,
    kept: Callable[[Tree], Tree] | None = None,
) -> tuple[Tree, Tree]:
    """(state, its shardings). trainable: arrays in their shards, or their shapes: then the state is shapes too.

    scale, watch, kept: as in `init_state`.
    """

    def initial(trainable: Tree) -> Tree:
        return init_state(trainable, optimizer, scale, watch, kept)

    shapes = jax.eval_shape(initial, trainable)
    where = state_homes(shapes, layout, offload)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trainable)):
        return jax.tree.map(lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), shapes, where), where
    rest = {name: home for name, home in where.items() if name != "trainable"}
    made = run_once(lambda t: {n: s for n, s in initial(t).items() if n != "trainable"}, trainable, shardings=rest)
    return {"trainable": jax.device_put(trainable, where["trainable"]), **made}, where


def abstract(state: Tree) -> Tree:
    """The state's shapes, types and shardings, for a checkpoint to be restored into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def owned(tree: Tree) -> Tree:
    """The arrays of a tree in memory that is the runtime's own, copied one after another; what they were is given up.

    On a CPU a loaded array is the very memory of the numpy array that it was read into. A step cannot write its new
    state there, and the first one would hold both.
    """

    def own(array: jax.Array) -> jax.Array:
        if next(iter(array.devices())).platform != "cpu":
            return array
        copy = jax.block_until_ready(jnp.copy(array))
        array.delete()
        return copy

    return jax.tree.map(own, tree)
