import jax.numpy as jnp


def positions_of(rank, time_local, parts):
    assert parts == 1
    return jnp.arange(time_local)
