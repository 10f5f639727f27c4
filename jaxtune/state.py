"""The training state, made in its shards: what a step changes, and so what a checkpoint holds."""

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.models.weights import Tree
from jaxtune.optim import state_shardings
from jaxtune.step import init_state


def make_state(
    trainable: Tree, optimizer: optax.GradientTransformation, mesh: Mesh, scale: float = 1.0
) -> tuple[Tree, Tree]:
    """(state, its shardings): an optimiser's moments lie where their weights lie, counters everywhere.

    scale: the first one of a float16 loss.
    """

    def initial(trainable: Tree) -> Tree:
        return init_state(trainable, optimizer, scale)

    shapes = jax.eval_shape(initial, trainable)
    homes = jax.tree.map(lambda array: array.sharding, trainable)
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes["guard"])
    moments = state_shardings(shapes["optimizer"], trainable, homes)
    where = {"trainable": homes, "optimizer": moments, "guard": everywhere}
    return jax.jit(initial, out_shardings=where)(trainable), where


def abstract(state: Tree) -> Tree:
    """The state's shapes, types and shardings, for a checkpoint to be restored into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
