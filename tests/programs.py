"""A training step of a small random model on any mesh, with batches to feed it: what the tests of parallelism share."""

from functools import cache, cached_property

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import tune
from jaxtune.config import make_config
from jaxtune.kept import compiled_anew
from jaxtune.mesh import axes_sharding, check_model, make_mesh, shardings
from jaxtune.models.config import ModelConfig, Rope
from jaxtune.models.decoder import Model
from jaxtune.models.execution import Execution
from jaxtune.models.weights import Weight, init_params, leaves_with_path, map_tree
from jaxtune.number_types import compute_dtype
from jaxtune.program import build
from jaxtune.tune.method import get_path

HIDDEN, VOCAB, LAYERS, ROWS, TIME = 64, 512, 4, 16, 32
CONFIG = ModelConfig("qwen2", VOCAB, HIDDEN, 128, LAYERS, 8, 2, 8, 256, tied=True, qkv_bias=True, rope=Rope(theta=1e4))
LORA = {"method": "lora", "rank": 4, "dropout": 0.1, "targets": "all-linear"}
FULL = {"method": "full"}
STEPS = 10


@cache
def drawn(weight: Weight) -> np.ndarray:
    """What init_params makes of a weight. On one device: to compile it for each mesh takes longer than their steps."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return np.asarray(init_params({"w": weight}, {"w": here}, 0, 0.1, jnp.dtype(jnp.float32))["w"])


def placed(weight: Weight, home) -> jax.Array:
    return jax.device_put(drawn(weight), home, may_alias=False)


def make_batch(step, micro_batches=1, rows=ROWS, time=TIME, vocab=VOCAB, virtual=0):
    """Two documents a row, 40 % of the tokens supervised, some padding at the end of some rows.

    virtual: so many tokens at the start of each document are virtual ones.
    """
    draw = np.random.default_rng(step)
    shape = rows, time
    tokens = draw.integers(0, vocab, (rows, time + 1)).astype(np.int32)
    cut = draw.integers(time // 4, time, (rows, 1))
    real = np.arange(time) < time - draw.integers(0, time // 8, (rows, 1))
    second = np.arange(time) >= cut
    batch = {
        "tokens": tokens[:, :-1] * real,
        "targets": tokens[:, 1:],
        "mask": ((draw.random(shape) < 0.4) & real).astype(np.float32),
        "positions": np.where(second, np.arange(time) - cut, np.arange(time)).astype(np.int32),
        "segments": ((1 + second) * real).astype(np.int32),
    }
    is_virtual = (batch["positions"] < virtual) & real
    batch["tokens"] = np.where(is_virtual, vocab + batch["positions"], batch["tokens"]).astype(np.int32)
    batch["mask"] *= ~is_virtual
    return {name: x.reshape(micro_batches, rows // micro_batches, time) for name, x in batch.items()}


class Stepper:
    """The program of a configuration on the mesh that it asks for, on as many of the fake devices as that takes.

    sections: of a configuration, but for model and data. Everything starts from the same random weights.
    """

    def __init__(self, model: ModelConfig = CONFIG, *, rows=ROWS, time=TIME, std=0.1, attention="xla", **sections):
        self.config = make_config({"model": {"path": "-"}, "data": {"path": "-"}, **defaults(sections)})
        sizes = self.config.mesh.sizes.values()
        self.mesh = make_mesh(self.config.mesh, jax.devices()[: int(np.prod([s for s in sizes if s > 0]))])
        self.rows, self.time, self.vocab = rows, time, model.vocab_size
        check_model(self.mesh, model)
        self.program = self._build(model, std, attention)
        self.state, self.frozen = self.program.state, self.program.frozen

    def _build(self, model: ModelConfig, std: float, attention: str):
        section = self.config.tune
        execution = Execution.of(self.config, compute_dtype(self.config.precision.compute), attention)
        settings, stacks = tune.layout(section, model, one_stack=self.mesh.shape["pipe"] > 1)
        self.model = declared = Model.create(settings, stacks, execution, tune.hooks(section, model))
        places = execution.places
        own = Model.create(settings, stacks).weights  # without what the method adds
        params = map_tree(placed, own, shardings(self.mesh, settings, own, *places))
        where = axes_sharding(self.mesh, settings, *places)
        params, mask = tune.apply(section, params, declared.weights, 0, where)
        return build(self.config, declared, self.mesh, params, mask, STEPS)

    def batch(self, step):
        sizes = self.config.train.micro_batches, self.rows, self.time, self.vocab, len(self.model.virtual_ids)
        return self.program.put(make_batch(step, *sizes))

    @cached_property
    def compiled(self):
        with compiled_anew(self.program.layout.mesh):
            return self.program.train_step.lower(self.state, self.frozen, self.batch(1), jnp.int32(1)).compile()

    def run(self, steps=STEPS, first=1):
        """The losses of these steps."""
        losses = []
        for number in range(first, first + steps):
            self.state, metrics = self.compiled(self.state, self.frozen, self.batch(number), jnp.int32(number))
            losses.append(float(metrics["loss"]))
        return losses

    def weights(self):
        """Every trained array by its Hugging Face key, as it is now."""
        found, gates = {}, tune.gates(self.config.tune, self.model.weights)
        trained = self.program.saved(self.state)["trainable"]
        for path, weight in leaves_with_path(self.model.weights):
            for part, array in jax.tree_util.tree_leaves_with_path(get_path(trained, path)):
                trains = gates.get(path, [True] * len(weight.keys))
                for row, key in ((row, key) for row, key in enumerate(weight.keys) if trains[row]):
                    name = key + jax.tree_util.keystr(part)
                    found[name] = np.asarray(array)[() if weight.layers is None else row]
        return found

    @property
    def memory(self):
        return self.compiled.memory_analysis()

    @cached_property
    def hlo(self):
        return self.compiled.as_text()


def defaults(sections):
    """The sections with what every test wants where it does not say otherwise."""
    own = {"optim": {"lr": 1e-2, "warmup": 0, "schedule": "constant"}, "tune": FULL, "mesh": {"fsdp": 1}}
    return {name: {**own.get(name, {}), **sections.get(name, {})} for name in {**own, **sections}}
