"""What the optimiser makes of a step's gradients: new parameters, and what it keeps. Not the gradients themselves."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.models.weights import Path, Tree
from jaxtune.optim import descend
from jaxtune.parallel.layout import Layout
from jaxtune.parallel.offload import fetched
from jaxtune.parallel.streamed import any_away, streamed
from jaxtune.tune.method import Course

ByLayer = dict[Path, jax.Array]  # a number for each layer along dimension 0


def make_update(
    optimizer: optax.GradientTransformationExtraArgs,
    layout: Layout,
    homes: Tree,
    gates: ByLayer,
    numbers: ByLayer,
    rates: Tree | None,
    course: Course | None,
) -> Callable[[Tree, Tree, jax.Array, jax.Array, jax.Array], Tree]:
    """(state, clipped gradients, learning rate, whether the step is good, step) -> the parts of the state that it
    moves.

    Where it is not they are as they were, bit for bit, but for what the course does then. gates, numbers, rates,
    course, homes: as in make_train_step. What lies on the host is moved piece by piece, but with a course, which wants
    to see all that trains at once.
    """
    names = ("trainable", "optimizer")
    lie = homes["trainable"], homes["optimizer"]

    def move(
        params: Tree, moments: Any, grads: Tree, by_layer: tuple[ByLayer, ByLayer], part: Any, lr: jax.Array
    ) -> tuple[Tree, Any]:
        params, (gates, numbers) = layout.pinned(params, part), by_layer
        direction, moved = optimizer.update(grads, moments, params, numbers=numbers)
        return descend(params, rated(gated(direction, gates), part(rates)), lr), moved

    def update(state: Tree, grads: Tree, lr: jax.Array, good: jax.Array, step: jax.Array) -> Tree:
        before, by_layer = (state["trainable"], state["optimizer"]), (gates, numbers)
        if course is None and any_away(*lie):
            return dict(zip(names, streamed(partial(move, lr=lr), before, lie, grads, by_layer, good), strict=True))
        params, moments = before = fetched(before, lie)
        after = move(params, moments, grads, by_layer, lambda tree: tree, lr)
        params, moments = jax.tree.map(partial(jnp.where, good), after, before)
        own = {}
        if course is not None:
            own["method"], params = course.after(state["method"], params, grads, step, good)
        return {"trainable": params, "optimizer": moments, **own}

    return update


def gated(tree: Tree, gates: ByLayer) -> Tree:
    """The tree with zeros for the layers that do not train: neither gradients nor weight decay move them."""

    def gate(path: tuple, x: jax.Array) -> jax.Array:
        own = gates.get(tuple(part.key for part in path if hasattr(part, "key")))
        return x if own is None else x * own.reshape(-1, *[1] * (x.ndim - 1))

    return jax.tree_util.tree_map_with_path(gate, tree)


def rated(tree: Tree, rates: Tree | None) -> Tree:
    """The tree with every array multiplied by its factor."""
    return tree if rates is None else jax.tree.map(lambda x, rate: x if rate == 1 else x * rate, tree, rates)
