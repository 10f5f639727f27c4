"""What is offloaded lies in the host's memory between steps, and comes to the device no sooner than it is used."""

import jax
import numpy as np
import pytest

from jaxtune.models.execution import HOST
from tests.programs import Stepper


def argument_bytes(stepper, kind):
    """Of the state, on one device, in this kind of memory, as the compiled step takes it."""
    homes = stepper.compiled.input_shardings[0][0]
    pairs = zip(jax.tree.leaves(stepper.state), jax.tree.leaves(homes), strict=True)
    return sum(x.dtype.itemsize * int(np.prod(h.shard_shape(x.shape))) for x, h in pairs if h.memory_kind == kind)


@pytest.fixture(scope="module")
def plain():
    return Stepper(mesh={"fsdp": 4})


@pytest.mark.parametrize(("what", "parts"), [("params", 1), ("optimizer", 2)])
def test_offloaded_state_is_taken_from_the_hosts_memory_and_from_no_other(plain, what, parts):
    away = Stepper(mesh={"fsdp": 4}, memory={"offload": [what]})
    moved = argument_bytes(away, HOST)
    params = sum(x.nbytes for x in jax.tree.leaves(plain.state["trainable"]))
    assert moved == pytest.approx(parts * params / 4, rel=0.02)  # norms are whole on every device
    assert argument_bytes(plain, HOST) == 0
    assert argument_bytes(plain, "device") - argument_bytes(away, "device") == moved
