"""An update that takes what lies on the host piece by piece gives the numbers of one that takes all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxtune.config import OptimSection
from jaxtune.models.weights import Weight
from jaxtune.optim import make_optimizer
from jaxtune.parallel.layout import Layout
from jaxtune.state import state_homes
from jaxtune.step import init_state
from jaxtune.update import make_update

OPTIMIZERS = {
    "adamw": {},
    "adamw_8bit": {},
    "adam": {},
    "sgd": {},
    "sgd with momentum": {"momentum": 0.9},
    "lion": {},
    "adafactor": {},
}
STACK, TABLE = PartitionSpec(None, None, "fsdp"), PartitionSpec(None, "fsdp")
SPECS = {
    "embed": {"weight": TABLE},
    "norm": {"weight": PartitionSpec()},
    "stacks": {"0": {"up": STACK, "frozen": None, "norm": PartitionSpec()}},
}
LAYERS = {"0": 3}
GATES = {("stacks", "0", "up"): jnp.array([1.0, 0.0, 1.0])}
SHAPES = {("stacks", "0", "up"): [(128, 200), (0,), (128, 256)]}  # without the zeros that fill a layer up
NUMBERS = {("stacks", "0", "up"): jnp.array([128.0 * 200, 0.0, 128.0 * 256])}


def declared(path, *shape):
    layers = range(LAYERS[path[1]]) if path[0] == "stacks" else None
    return Weight(shape, (None,) * len(shape), "/".join(path), layers=layers)


WEIGHTS = {
    "embed": {"weight": declared(("embed",), 128, 256)},
    "norm": {"weight": declared(("norm",), 256)},
    "stacks": {
        name: {"up": declared(("stacks", name), 128, 256), "norm": declared(("stacks", name), 256)} for name in LAYERS
    },
}
RATES = {
    "embed": {"weight": 1.0},
    "norm": {"weight": 4.0},
    "stacks": {name: {"up": 2.0, "frozen": None, "norm": 1.0} for name in LAYERS},
}


def drawn(seed):
    """Arrays of the trainable tree's shapes, None where a weight is frozen."""
    draw = np.random.default_rng(seed)
    trees = {**WEIGHTS, "stacks": {name: {**own, "frozen": None} for name, own in WEIGHTS["stacks"].items()}}
    return jax.tree.map(lambda w: jnp.asarray(draw.normal(size=w.full_shape), jnp.float32), trees)


class Update:
    """Of an optimiser; offload: what lies on the host."""

    def __init__(self, name, offload=()):
        mesh = jax.make_mesh((1, 1), ("pipe", "fsdp"), devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 2)
        section = OptimSection(name=name.split()[0], weight_decay=0.1, **OPTIMIZERS[name])
        optimizer = make_optimizer(section, WEIGHTS, mesh.shape, SHAPES)
        layout = Layout(mesh, SPECS, {}, SPECS, SPECS)
        made = init_state(drawn(0), optimizer)
        self.homes = state_homes(jax.eval_shape(lambda: made), layout, offload)
        self.state = jax.device_put(made, self.homes)
        self.update = make_update(optimizer, layout, self.homes, GATES, NUMBERS, RATES, None)

    def step(self, number, finite=True):
        new = self.update(self.state, drawn(number), jnp.float32(1e-2), jnp.bool_(finite), jnp.int32(number))
        self.state = jax.device_put({**self.state, **new}, self.homes)

    def numbers(self):
        return [np.asarray(x) for x in jax.tree.leaves({n: self.state[n] for n in ("trainable", "optimizer")})]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_piece_by_piece_gives_the_same_bits(name):
    whole, pieces = Update(name), Update(name, ("optimizer", "params"))
    start = pieces.numbers()
    for number, finite in ((1, True), (2, False)):
        before = pieces.numbers()
        with jax.disable_jit():  # XLA rounds as it fuses: one operation at a time there is nothing to fuse
            whole.step(number, finite)
            pieces.step(number, finite)
        for old, one, other in zip(before, whole.numbers(), pieces.numbers(), strict=True):
            np.testing.assert_array_equal(one, other)
            assert finite or np.array_equal(old, other)
    assert not all(np.array_equal(a, b) for a, b in zip(start, pieces.numbers(), strict=True))
