"""PiSSA's start is peft's, its training too, and the adapter that it leaves is a plain one over the original weights.

Files and merging are compared with peft in test_peft_methods.py, meshes with one device in test_method_meshes.py.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune import ops
from jaxtune.assemble import Source, assemble
from jaxtune.config import make_config, tune_section
from jaxtune.errors import AdapterError, ConfigError
from jaxtune.float8 import Float8
from jaxtune.leaves import combine
from jaxtune.loading import open_run
from jaxtune.mesh import single_device_mesh
from jaxtune.tune.merge import merged
from jaxtune.tune.peft_io import save_adapter
from jaxtune.tune.pissa import factors, pissa_start
from jaxtune.tune.plan import make_plan
from tests.programs import Stepper
from tests.runs import sections, unfinish
from tests.tune.support import logits, peer_logits, peer_model, tuned
from tests.tune.test_peft_methods import difference, our_losses, peer_losses

OPTIONS = {"method": "pissa", "rank": 4, "alpha": 6, "targets": ["q_proj", "down_proj"]}


def peft_s(**options):
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    return get_peft_model(peer_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa", **settings))


def leaf(made, name="q_proj"):
    return made.params["stacks"]["0"]["mlp" if name == "down_proj" else "attention"][name]["weight"]


def test_the_factors_are_the_largest_singular_values_with_settled_signs():
    w = jnp.array(np.random.default_rng(0).normal(size=(12, 20)), jnp.float32)
    a, b = factors(w, 3, 1.5, 5)
    u, values, v = np.linalg.svd(np.asarray(w))
    np.testing.assert_allclose(1.5 * (a @ b).T, (u[:, :3] * values[:3]) @ v[:3], atol=1e-5)
    np.testing.assert_allclose(jnp.sum(a**2, axis=0), [*(values[:3] / 1.5), 0, 0], rtol=1e-5)
    assert not np.any(b[3:])
    columns = np.asarray(a[:, :3])
    assert (columns[np.abs(columns).argmax(axis=0), range(3)] > 0).all()


def test_the_start_is_peft_s():
    made, model = tuned(tune_section(**OPTIONS)), peft_s()
    for name, block in (("q_proj", "self_attn"), ("down_proj", "mlp")):
        ours = leaf(made, name)
        for layer in range(3):
            module = getattr(getattr(model.base_model.model.model.layers[layer], block), name)
            a, b = (getattr(module, part)["default"].weight.detach().numpy() for part in ("lora_A", "lora_B"))
            np.testing.assert_allclose(ours.base[layer], module.base_layer.weight.detach(), atol=1e-5)
            np.testing.assert_allclose((ours.a[layer] @ ours.b[layer]).T, b @ a, atol=1e-5)
            np.testing.assert_allclose(np.abs(ours.a[layer].T), np.abs(a), atol=1e-4)


def test_ten_steps_follow_peft_s():
    expected = peer_losses(peft_s().train())
    assert expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(our_losses(tuned(tune_section(**OPTIONS))), expected, rtol=1e-4)


def test_a_fresh_adapter_changes_nothing_but_rounding_and_a_layer_without_one_keeps_its_weight():
    base = tuned(tune_section(method="full"))
    made = tuned(tune_section(method="pissa", rank=4, layers=[0, 2]))
    expected, weight = logits(base.model, base.params), base.params["stacks"]["0"]["attention"]["q_proj"]["weight"]
    assert difference(logits(made.model, made.params), expected) < 1e-5
    np.testing.assert_array_equal(leaf(made).base[1], weight[1])
    assert np.abs(leaf(made).base[0] - weight[0]).max() > 0.1
    np.testing.assert_allclose(ops.dense(leaf(made)), weight, atol=1e-6)


def test_what_is_stored_is_peft_s_conversion(tmp_path):
    """Names, shapes, settings and numbers of peft's save_pretrained with path_initial_model_for_weight_conversion."""
    import torch
    from safetensors.numpy import load_file

    model = peft_s()
    model.save_pretrained(tmp_path / "initial")
    config = json.loads((tmp_path / "initial" / "adapter_config.json").read_text())
    (tmp_path / "initial" / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += torch.randn_like(weight) * 0.1
    model.save_pretrained(tmp_path / "trained")
    made = tuned(tune_section(method="pissa", adapter=str(tmp_path / "trained")))
    expected = peer_logits(model.eval())
    model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    save_adapter(tmp_path / "ours", made.section, made.model.weights, made.params)
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {name: x.shape for name, x in mine.items()} == {name: x.shape for name, x in theirs.items()}
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 12, True)
    for name in (name for name in mine if "lora_A" in name):
        ours, peer = (x[name.replace("lora_A", "lora_B")] @ x[name] for x in (mine, theirs))
        np.testing.assert_allclose(ours, peer, atol=1e-5)
    assert difference(logits(made.model, merged(made.params)), expected) < 1e-5


def test_a_resumed_run_goes_on_bit_for_bit():
    """The start, with the frozen rest of the weights, is made anew; the checkpoint has only what trains."""
    sections = {"tune": {"method": "pissa", "rank": 4}, "mesh": {"fsdp": 2}}
    whole, first, second = Stepper(**sections), Stepper(**sections), Stepper(**sections)
    losses = whole.run(4)
    assert first.run(2) == losses[:2]
    second.state = jax.tree.map(lambda x, home: jax.device_put(np.asarray(x), home.sharding), first.state, second.state)
    assert second.run(2, first=3) == losses[2:]
    pairs = (combine(stepper.state["trainable"], stepper.frozen) for stepper in (whole, second))
    jax.tree.map(np.testing.assert_array_equal, *pairs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unfinished_run_is_read_with_the_start_that_it_grew_from(tiny_model, tmp_path, dtype):
    """That is of the weights in the run's type, whatever the type that they are read in; the adapter stays float32."""
    tune = {"method": "pissa", "rank": 4, "targets": ["q_proj"], "modules_to_save": ["model.norm"]}
    tree = sections(tiny_model(), tmp_path, steps=2, tune=tune, precision={"params": "bfloat16"})
    jaxtune.train(tree)
    source = Source.open(make_config(tree).model, tuning=tune_section(**tune))
    started = assemble(source, source.tuning, single_device_mesh(), dtype="bfloat16")
    unfinish(tmp_path / "run")
    read = open_run(tmp_path / "run", dtype, single_device_mesh()).assembled
    for name in ("first_a", "first_b", "base"):
        np.testing.assert_array_equal(getattr(leaf(read), name), getattr(leaf(started), name))
    moved = leaf(read).a - leaf(read).first_a
    assert 0 < np.abs(moved).max() < 0.1 and moved.dtype == read.params["norm"]["weight"].dtype == "float32"
    assert leaf(read).base.dtype == read.params["embed"]["weight"].dtype == dtype


def test_a_quantised_base_and_a_rank_beyond_the_weight_s_are_refused():
    section = tune_section(**OPTIONS)
    made = tuned(section)
    site = make_plan(section, made.model.weights).sites["stacks", "0", "attention", "q_proj", "weight"]
    start = pissa_start(section, site, 0)
    with pytest.raises(ConfigError, match=r"tune.method pissa: the model is quantised"):
        start.function(Float8(leaf(made).base), *start.arrays, **start.settings)
    with pytest.raises(AdapterError, match=r"tune.rank 17: model.layers.0.self_attn.k_proj is 16 x 32 and has only 16"):
        tuned(tune_section(method="pissa", rank=17, targets=["k_proj"]))
