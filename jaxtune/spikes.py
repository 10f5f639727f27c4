"""Steps whose loss stands far above the last ones: a batch of garbage, or the first sign that training comes apart.

A window of the last good losses is part of the state, so that a run which goes on judges as one that was not cut off.
Pure functions: step.py calls them, and skips what they find as it skips a step that is not finite. The rule is that of
Levanter's skip_step: more than so many standard deviations above the window's mean.
"""

import jax
import jax.numpy as jnp

WINDOW = 128  # losses
LEAST = 16  # of them before any step is judged

Losses = dict[str, jax.Array]


def init() -> Losses:
    """Before the first step. losses: float32 [WINDOW], the newest over the oldest; count: how many there ever were."""
    return {"losses": jnp.zeros(WINDOW, jnp.float32), "count": jnp.int32(0)}


def is_spike(window: Losses, loss: jax.Array, sigmas: float) -> jax.Array:
    """Whether a loss is more than `sigmas` standard deviations above the window's mean; false for one that is nan."""
    known = jnp.arange(WINDOW) < window["count"]
    number = jnp.maximum(known.sum(), 1)
    mean = jnp.where(known, window["losses"], 0).sum() / number
    spread = jnp.sqrt(jnp.where(known, (window["losses"] - mean) ** 2, 0).sum() / number)
    return (window["count"] >= LEAST) & (loss > mean + sigmas * spread)


def advance(window: Losses, loss: jax.Array, good: jax.Array) -> Losses:
    """The window after a step. good: whether it was applied; a loss that was not is not remembered."""
    place = window["count"] % WINDOW
    losses = jnp.where(good, window["losses"].at[place].set(loss.astype(jnp.float32)), window["losses"])
    return {"losses": losses, "count": window["count"] + good}
