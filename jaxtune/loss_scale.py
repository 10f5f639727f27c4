"""Loss scaling for float16, whose smallest numbers a gradient would fall below: what a step keeps of its own health.

The loss is multiplied by a scale before it is differentiated and the gradients are divided by it afterwards. Where
that overflows, the step is not applied and the scale is halved; after a window of good steps in a row it is
doubled. This is torch.amp.GradScaler's rule with factors 2 and 1/2, with a floor at 1. Pure functions: step.py calls
them, and the state lies in its `guard`.
"""

from typing import Any

import jax
import jax.numpy as jnp

Guard = dict[str, jax.Array]
FLOOR = 1.0
LARGEST = float(jnp.finfo(jnp.float32).max)


def init(initial: float) -> Guard:
    """A guard before the first step: counters of steps that were not applied, the scale, and its good steps."""
    return {
        "bad_in_a_row": jnp.int32(0),
        "skipped": jnp.int32(0),
        "loss_scale": jnp.float32(initial),
        "good_steps": jnp.int32(0),
    }


def begun_again(guard: Guard, initial: float) -> Guard:
    """The guard with a scale that has seen no step yet."""
    return {**guard, "loss_scale": jnp.float32(initial), "good_steps": jnp.int32(0)}


def unscaled(loss: jax.Array, grads: Any, scale: jax.Array) -> tuple[jax.Array, Any]:
    """The loss and the gradients of a loss that was multiplied by `scale`, in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) / scale, (loss, grads))


def advance(guard: Guard, finite: jax.Array, window: int | None, spike: jax.Array | bool = False) -> Guard:
    """The guard after a step. finite: whether its loss and gradients were; spike: whether it was not applied though
    they were (spikes.py), which is not the scale's fault.

    window: good steps in a row after which the scale doubles; None: nothing is scaled, and the scale stays. A step
    that overflowed counts as bad only when the scale can fall no further: until then it may be the scale's fault.
    """
    blamed = ~finite if window is None else ~finite & (guard["loss_scale"] <= FLOOR)
    scaling = {} if window is None else _moved(guard["loss_scale"], guard["good_steps"], finite, window)
    return {
        **guard,
        **scaling,
        "bad_in_a_row": jnp.where(finite & ~jnp.bool_(spike), 0, guard["bad_in_a_row"] + (blamed | spike)),
        "skipped": guard["skipped"] + (~finite | spike),
    }


def _moved(scale: jax.Array, good: jax.Array, finite: jax.Array, window: int) -> Guard:
    full = finite & (good + 1 >= window)
    grown = jnp.where(scale > LARGEST / 2, scale, scale * 2)
    fallen = jnp.maximum(scale / 2, FLOOR)
    return {
        "loss_scale": jnp.where(full, grown, jnp.where(finite, scale, fallen)),
        "good_steps": jnp.where(finite & ~full, good + 1, 0),
    }
