"""No part of the state is in memory twice: neither in a run's first step nor after a checkpoint was restored."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from jaxtune import loop
from jaxtune.config import make_config
from jaxtune.hf_io import _aligned
from jaxtune.state import owned
from tests.runs import sections, unfinish


def places(tree) -> set[int]:
    return {part.data.unsafe_buffer_pointer() for array in jax.tree.leaves(tree) for part in array.addressable_shards}


def borrowed():
    """(numpy's memory, an array of JAX that is it)."""
    memory = _aligned([64, 64], jnp.float32.dtype)
    memory[:] = 1.0
    array = jax.make_array_from_callback(
        memory.shape, jax.sharding.SingleDeviceSharding(jax.devices()[0]), lambda _: memory
    )
    assert places(array) == {memory.ctypes.data}
    return memory, array


def test_what_is_owned_is_written_in_place_and_what_it_was_is_given_up():
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    memory, array = borrowed()
    assert places(add(array)) != {memory.ctypes.data}
    memory, array = borrowed()
    mine = owned({"x": array})["x"]
    assert array.is_deleted()
    before = places(mine)
    assert places(add(mine)) == before != {memory.ctypes.data}


@pytest.fixture
def watched(tiny_model, tmp_path):
    """watched(steps) -> (what `look(job)` saw before the first step of a run or of its rest, and the job after it)."""

    def watched(steps, look):
        seen, go_on = [], loop.go_on

        def looking(job, *rest):
            seen.append((look(job), job))
            return go_on(job, *rest)

        config = make_config(sections(tiny_model("qwen2"), tmp_path, steps=steps, tune={"method": "full"}))
        with mock.patch.object(loop, "go_on", looking):
            loop.train(config)
        return seen[0]

    return watched


def test_the_first_step_writes_the_weights_where_they_are(watched):
    before, job = watched(1, lambda job: places(job.state["trainable"]))
    assert places(job.state["trainable"]) == before


def test_a_restored_state_is_the_only_one(watched, tmp_path):
    watched(2, lambda job: None)
    unfinish(tmp_path / "run")
    given_up, job = watched(4, lambda job: all(x.is_deleted() for x in jax.tree.leaves(job.program.state)))
    assert given_up and not any(x.is_deleted() for x in jax.tree.leaves(job.state))
