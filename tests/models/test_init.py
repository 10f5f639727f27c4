"""Random weights to train from scratch."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.config import MeshSection, make_config
from jaxtune.mesh import make_mesh, shardings
from jaxtune.models.decoder import Model
from jaxtune.models.weights import init_params, leaves_with_path, path_key
from tests.programs import CONFIG, LAYERS


def test_every_layer_has_the_numbers_of_its_own_name_on_any_mesh():
    weights, found = Model.create(CONFIG).weights, []
    for sizes in ({"fsdp": 1}, {"fsdp": 2, "tensor": 2}):
        config = make_config({"model": {"path": "-"}, "data": {"path": "-"}, "tune": {"method": "full"}, "mesh": sizes})
        mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(list(sizes.values())))])
        params = init_params(weights, shardings(mesh, CONFIG, weights), 7, 0.02, "float32")
        found.append(dict(leaves_with_path(params)))
    for path, weight in leaves_with_path(weights):
        one, split = (np.asarray(params[path]) for params in found)
        np.testing.assert_array_equal(one, split)
        if weight.init == "normal":
            rows = one[None] if weight.layers is None else one
            assert len(rows) == (1 if weight.layers is None else LAYERS)
            for key, row in zip(weight.keys, rows, strict=True):
                expected = 0.02 * jax.random.normal(path_key(7, key), weight.shape, jnp.float32)
                np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_layers_that_lie_apart_are_drawn_by_one_program(monkeypatch):
    traced, normal = [], jax.random.normal
    monkeypatch.setattr(
        jax.random, "normal", lambda key, shape, dtype: traced.append(shape) or normal(key, shape, dtype)
    )
    apart = Model.create(CONFIG, tuple(range(layer, layer + 1) for layer in range(LAYERS))).weights
    here = make_mesh(MeshSection(), jax.devices()[:1])
    params = init_params(apart, shardings(here, CONFIG, apart), 7, 0.03, "float32")
    assert len(traced) == len(set(traced))
    first, other = (params["stacks"][name]["mlp"]["up_proj"]["weight"] for name in ("0", "3"))
    assert not np.array_equal(first, other)
