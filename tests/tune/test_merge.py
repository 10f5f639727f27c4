"""Merged weights: the adapter's function without the adapter, in the base's type and place."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config import tune_section
from jaxtune.tune.low_rank import LowRank
from jaxtune.tune.merge import merged
from tests.tune.support import difference, logits, randomised, tuned

SETTINGS = {
    "linear maps": {"targets": "all-linear", "rank_pattern": {"layers.1.*q_proj": 3}},
    "some layers": {"layers": [1, 2]},
    "both ends": {"targets": ["embed_tokens", "lm_head", "q_proj"], "use_rslora": True},
    "whole weights": {"modules_to_save": ["lm_head", "norm"], "bias": "all"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_merged_model_computes_what_the_adapted_one_does(settings):
    made = randomised(tuned(tune_section(**settings)))
    whole = merged(made.params)
    assert not [
        leaf for leaf in jax.tree.leaves(whole, is_leaf=lambda x: isinstance(x, LowRank)) if isinstance(leaf, LowRank)
    ]
    assert difference(logits(made.model, whole), logits(made.model, made.params)) < 2e-5


def test_a_fresh_adapter_merges_into_the_base_bit_for_bit():
    made, base = tuned(tune_section(targets="all-linear")), tuned(tune_section(method="full"))
    jax.tree.map(np.testing.assert_array_equal, merged(made.params), base.params)


def test_what_has_no_adapter_is_the_same_array():
    params = randomised(tuned(tune_section())).params
    assert merged(params)["norm"]["weight"] is params["norm"]["weight"]


def test_layers_that_are_alike_are_merged_by_one_program(monkeypatch):
    made, traced, dense = tuned(tune_section()), [], LowRank.dense
    leaf = made.params["stacks"]["0"]["attention"]["q_proj"]["weight"]
    monkeypatch.setattr(LowRank, "dense", lambda *of: traced.append(of) or dense(*of))
    merged({"stacks": {name: {"weight": replace(leaf, dropout=0.125)} for name in "012"}})
    assert len(traced) == 1


def test_a_merge_is_computed_in_float32_and_rounded_once():
    random = np.random.default_rng(0)
    base = random.normal(size=(2, 6, 5)).astype(np.float32)
    a, b = random.normal(size=(2, 5, 3)).astype(np.float32), random.normal(size=(2, 3, 6)).astype(np.float32)
    scale = np.array([0.5, 2.0], np.float32)
    leaf = LowRank(jnp.array(base, jnp.bfloat16), jnp.array(a), jnp.array(b), jnp.array(scale))
    found = merged({"stacks": {"0": {"weight": leaf}}})["stacks"]["0"]["weight"]
    exact = np.asarray(leaf.base, np.float64) + scale[:, None, None] * np.einsum("lir,lro->loi", a, b, dtype=np.float64)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact.astype(np.float32).astype(jnp.bfloat16))


MESHED = """
import jax, jax.numpy as jnp, numpy as np, sys
from jaxtune import tune
from jaxtune.config import MeshSection, tune_section
from jaxtune.mesh import axes_sharding, make_mesh, shardings
from jaxtune.models.decoder import Model
from jaxtune.tune.merge import merged
from jaxtune.tune.peft_io import save_adapter
from tests.tune.support import base_params, model_config, randomised, Tuned

directory, sizes = sys.argv[1], [int(size) for size in sys.argv[2].split("x")]
mesh = make_mesh(MeshSection(**dict(zip(("data", "fsdp", "tensor"), sizes))), jax.devices()[: int(np.prod(sizes))])
def build(section):
    section = tune.resolve(section)
    config, stacks = tune.layout(section, model_config("llama", tied=True))
    model = Model.create(config, stacks)
    params = base_params(model.weights, "llama", tied=True)
    where = shardings(mesh, config, model.weights)
    params = {name: jax.device_put(params[name], where[name]) for name in params}
    made = tune.apply(section, params, model.weights, 3, axes_sharding(mesh, config))
    for leaf in jax.tree.leaves(made[0]):
        assert leaf.sharding.mesh == mesh, leaf.sharding
    return Tuned(model, *made, section)

made = build(tune_section(rank=4, targets=["q_proj", "down_proj", "embed_tokens"], modules_to_save=["lm_head"],
                         rank_pattern={"layers.1.*": 2}))
q = made.params["stacks"]["0"]["attention"]["q_proj"]["weight"]
if sizes[2] > 1:
    assert not q.b.sharding.is_fully_replicated
if sizes[1] > 1:
    assert not q.a.sharding.is_fully_replicated
save_adapter(directory + "/fresh", made.section, made.model.weights, made.params)
moved = randomised(made)
save_adapter(directory + "/moved", made.section, made.model.weights, moved.params)
again = build(tune_section(adapter=directory + "/moved"))
save_adapter(directory + "/again", again.section, again.model.weights, again.params)
whole = merged(again.params)
w = whole["stacks"]["0"]["attention"]["q_proj"]["weight"]
assert w.sharding == q.base.sharding, (w.sharding, q.base.sharding)
np.save(directory + "/merged.npy", np.asarray(w))
"""


@pytest.mark.slow
def test_first_values_files_and_merges_are_the_same_on_a_mesh(run_python, tmp_path):
    for sizes in ("1x1x1", "2x2x2"):
        (tmp_path / sizes).mkdir()
        done = run_python(MESHED, tmp_path / sizes, sizes, devices=8)
        assert done.returncode == 0, done.stderr
    one, other = tmp_path / "1x1x1", tmp_path / "2x2x2"
    for name in ("fresh", "moved", "again"):
        file = f"{name}/adapter_model.safetensors"
        assert (one / file).read_bytes() == (other / file).read_bytes(), name
    np.testing.assert_allclose(np.load(one / "merged.npy"), np.load(other / "merged.npy"), atol=1e-6)
    assert (one / "moved/adapter_model.safetensors").read_bytes() == (
        one / "again/adapter_model.safetensors"
    ).read_bytes()
