"""What is offloaded lies in the host's memory between steps, and comes to the device no sooner than it is used."""

import json

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
    assert moved == pytest.approx(parts * params / 4, rel=0.01)
    assert argument_bytes(plain, HOST) == 0
    assert argument_bytes(plain, "device") - argument_bytes(away, "device") == moved


# Eight layers of 45 million parameters on four devices: 364 MB of parameters each, 728 MB of moments. libtpu keeps
# small arrays in another memory, which is not counted; these do not fit there.
PEAKS = """
import json
import sys

from jaxtune.config import make_config
from jaxtune.mesh import make_mesh
from jaxtune.models.config import ModelConfig
from jaxtune.plan.compiling import compile_step
from jaxtune.plan.program import make_step
from jaxtune.plan.target import choose

MODEL = ModelConfig("qwen2", 4096, 2048, 5632, 8, 16, 8, 128, 2048)
target = choose("v5e:2x2", None)
peaks = []
for offload in json.loads(sys.argv[1]):
    config = make_config({
        "model": {"path": "-"},
        "data": {"path": "-", "max_length": 128},
        "tune": {"method": "full"},
        "train": {"batch_size": 64},
        "mesh": {"fsdp": 4},
        "memory": {"offload": offload, "remat": ["after_attention", "gate", "up"]},
    })
    plan = compile_step(make_step(config, MODEL, make_mesh(config.mesh, target.devices)), target)
    peaks.append((plan.memory.peak, plan.memory.host))
print(json.dumps(peaks))
"""


@pytest.mark.real
@pytest.mark.slow
def test_a_tpus_peak_falls_by_what_is_offloaded(run_python, libtpu):
    choices = [], ["optimizer"], ["params"], ["activations"], ["optimizer", "params", "activations"]
    done = run_python(PEAKS, json.dumps(choices), env=libtpu, timeout=3000)
    assert done.returncode == 0, done.stderr
    none, optimizer, params, activations, every = json.loads(done.stdout.splitlines()[-1])
    parameters = 364e6  # bytes on a device
    assert none[1] < 1e6
    assert none[0] - optimizer[0] > 0.9 * 2 * parameters
    assert none[0] - params[0] > 0.9 * parameters
    assert none[0] - activations[0] > 0.5e9
    assert every[0] < min(optimizer[0], params[0], activations[0])
