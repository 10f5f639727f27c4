"""Bottleneck adapters. The peer is AdapterHub's library adapters 1.3: tests/tune/adapterhub/ has adapters that it
saved, its logits with them and its losses in training; make.py there says how they were made.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxtune
from jaxtune import tune
from jaxtune.config import make_config, tune_section
from jaxtune.errors import AdapterError, ConfigError
from jaxtune.export import export_run
from jaxtune.leaves import partition
from jaxtune.mesh import single_device_mesh
from jaxtune.models.decoder import Model
from jaxtune.models.families import parse_config
from jaxtune.models.weights import HOOKS, leaves_with_path, map_tree
from jaxtune.ops import Noise
from jaxtune.optim import decay_mask
from jaxtune.program import build
from jaxtune.tune.bottleneck import BottleneckHooks, trained
from jaxtune.tune.peft_io import load_adapter, save_adapter
from tests.runs import sections
from tests.tune.support import Tuned, difference, logits, model_config, tuned

FILES = Path(__file__).parent / "adapterhub"
RESULTS = load_file(FILES / "logits.safetensors")
TOKENS = RESULTS["tokens"]
NAMES = ["houlsby", "pfeiffer", "parallel", "learned"]
METHODS = {"houlsby": "houlsby", "pfeiffer": "pfeiffer", "parallel": "parallel", "learned": "parallel"}
TOLERANCE = 1e-4


def made_for(section) -> Tuned:
    """The library's tiny Llama with a section's adapters."""
    base = load_file(FILES / "model" / "model.safetensors")
    config, stacks = tune.layout(section, parse_config(json.loads((FILES / "model" / "config.json").read_text())))
    model = Model.create(config, stacks, hooks=tune.hooks(section, config))

    def take(weight):
        arrays = [base[key] for key in weight.keys]
        return jnp.array(arrays[0] if weight.layers is None else np.stack(arrays))

    params = map_tree(take, Model.create(config, stacks).weights)
    return Tuned(model, *tune.apply(section, params, model.weights, 0), section)


@pytest.mark.parametrize("name", NAMES)
def test_the_library_s_adapter_computes_the_same_here(name):
    section, _ = load_adapter(FILES / name)
    assert section.method == METHODS[name]
    made = made_for(section)
    assert difference(RESULTS["none"], RESULTS[name]) > 0.1
    assert difference(logits(made.model, made.params, TOKENS), RESULTS[name]) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_the_library_wrote(name, tmp_path):
    made = made_for(load_adapter(FILES / name)[0])
    save_adapter(tmp_path / "a", made.section, made.model.weights, made.params)
    theirs, ours = (load_file(path / "adapter.safetensors") for path in (FILES / name, tmp_path / "a"))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key])
    theirs, ours = (json.loads((path / "adapter_config.json").read_text()) for path in (FILES / name, tmp_path / "a"))
    assert ours["config"].items() <= theirs["config"].items()
    assert (ours["name"], ours["hidden_size"], ours["version"]) == (name, 16, theirs["version"])
    absent = {key for key in theirs["config"].keys() - ours["config"].keys() if "phm" not in key}
    assert absent == {"hypercomplex_nonlinearity", "init_weights_seed", "inv_adapter_reduction_factor"}


def batch():
    targets = np.pad(TOKENS[:, 1:], ((0, 0), (0, 1)))
    arrays = {
        "tokens": TOKENS,
        "targets": targets,
        "mask": np.pad(np.ones_like(TOKENS[:, 1:], np.float32), ((0, 0), (0, 1))),
        "positions": np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape),
        "segments": np.ones_like(TOKENS),
    }
    return {name: jnp.asarray(array)[None] for name, array in arrays.items()}


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_follow_the_library_s(name):
    made = made_for(load_adapter(FILES / name)[0])
    optim = {"lr": 1e-2, "schedule": "constant", "warmup": 0, "clip_norm": None}
    config = make_config({"model": {"path": "-"}, "data": {"path": "-"}, "tune": made.section, "optim": optim})
    program = build(config, made.model, single_device_mesh(), made.params, made.mask, 10)
    state, losses = program.state, []
    for step in range(1, 11):
        state, metrics = program.train_step(state, program.frozen, batch(), jnp.int32(step))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, RESULTS[f"{name} losses"], rtol=1e-4)
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel"])
def test_it_starts_as_the_library_s_does(method):
    made = tuned(tune_section(method=method, reduction_factor=2, scaling="channel", leave_out=[1]))
    arrays = [(path, array) for path, array in leaves_with_path(made.params) if HOOKS in path]
    by_name = {
        name: np.concatenate([np.ravel(array) for path, array in arrays if path[-1] == name and path[1] != "1"])
        for name in ("down", "down_bias", "up", "up_bias", "scaling")
    }
    assert not by_name["down_bias"].any() and not by_name["up_bias"].any() and (by_name["scaling"] == 1).all()
    if method == "parallel":  # kaiming_uniform(a=sqrt 5) over 32 inputs, and zeros
        assert not by_name["up"].any()
        assert abs(by_name["down"]).max() <= 32**-0.5
        assert by_name["down"].std() == pytest.approx(32**-0.5 / 3**0.5, rel=0.1)
    else:
        assert by_name["down"].std() == pytest.approx(0.02, rel=0.1)
        assert by_name["up"].std() == pytest.approx(0.02, rel=0.1)


def test_a_layer_that_is_left_out_has_no_adapter_and_trains_none():
    made = tuned(tune_section(method="houlsby", leave_out=[1]))
    assert [list(stack) for stack in made.model.stacks] == [[0], [1], [2]]
    mask = made.mask["stacks"]["1"][HOOKS]
    assert not any(jax.tree.leaves(mask)) and all(jax.tree.leaves(made.mask["stacks"]["2"][HOOKS]))
    assert not any(np.any(array) for array in jax.tree.leaves(made.params["stacks"]["1"][HOOKS]))


@pytest.mark.parametrize("leave_out", [[3], [0, 1, 2]])
def test_leaving_out_what_is_not_there_or_everything_is_refused(leave_out):
    section = tune_section(method="pfeiffer", leave_out=leave_out)
    weights = Model.create(model_config(), hooks=tune.hooks(section, model_config())).weights
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        trained(section, weights)


def test_a_pack_gives_each_document_its_own_logits():
    made = made_for(load_adapter(FILES / "houlsby")[0])
    first, second = TOKENS
    packed = np.concatenate([first, second])[None]
    positions = np.concatenate([np.arange(7), np.arange(7)])[None]
    segments = np.repeat([1, 2], 7)[None]
    hidden, _ = made.model.hidden(made.params, jnp.array(packed), jnp.array(positions), jnp.array(segments))
    found = np.asarray(made.model.logits(made.params, hidden)).reshape(2, 7, -1)
    assert difference(found, RESULTS["houlsby"]) < TOLERANCE


def test_dropout_acts_on_what_an_adapter_adds():
    made = made_for(load_adapter(FILES / "parallel")[0])
    model = replace(made.model, hooks=replace(made.model.hooks, dropout=0.5))
    positions, segments = jnp.broadcast_to(jnp.arange(7), TOKENS.shape), jnp.ones(TOKENS.shape, jnp.int32)
    noise = Noise(jax.random.key(0), jnp.arange(14).reshape(2, 7))
    plain, same, dropped = (
        m.hidden(made.params, jnp.array(TOKENS), positions, segments, noise=n)[0]
        for m, n in ((made.model, noise), (model, None), (model, noise))
    )
    np.testing.assert_array_equal(plain, same)
    assert difference(np.asarray(dropped), np.asarray(plain)) > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phm_layer": True}, "phm_layer = True"),
        ({"ln_before": True}, "ln_before = True"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln 'post_add'; allowed is True"),
        ({"stochastic_depth": 0.1}, "stochastic_depth"),
        ({"mh_adapter": False, "output_adapter": False}, "without a peft_type"),
        ({"reduction_factor": {"default": 16}}, "reduction_factor"),
        ({"non_linearity": "mish"}, "non_linearity"),
    ],
)
def test_an_arrangement_that_we_do_not_have_is_refused_by_name(changes, message, tmp_path):
    tree = json.loads((FILES / "houlsby" / "adapter_config.json").read_text())
    tree["config"] |= changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(tree))
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path)


def test_a_pickled_adapter_is_never_opened(tmp_path):
    (tmp_path / "adapter_config.json").write_text((FILES / "houlsby" / "adapter_config.json").read_text())
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match="can run any code"):
        load_adapter(tmp_path)


def test_a_run_ends_in_adapterhub_s_files_which_load_and_do_not_merge(tiny_model, tmp_path):
    base, run = tiny_model("llama"), tmp_path / "run"
    method = {"method": "houlsby", "reduction_factor": 4, "dropout": 0.1, "name": "counting"}
    jaxtune.train(sections(base, tmp_path, steps=2, tune=method))
    assert {path.name for path in (run / "adapter").iterdir()} == {"adapter_config.json", "adapter.safetensors"}
    tokens = np.arange(20)[None]
    models = jaxtune.load_model(base), jaxtune.load_model(base, adapter=run / "adapter"), jaxtune.load_model(run)
    plain, adapted, of_run = (model.logits(tokens) for model in models)
    np.testing.assert_array_equal(adapted, of_run)
    assert difference(plain, adapted) > 1e-3
    ids = list(range(5, 12))
    for _ in range(3):  # with a cache, and computed anew for each token
        ids.append(int(models[1].logits(np.array([ids]))[0, -1].argmax()))
    assert models[1]._generator.tokens(models[1].params, [ids[:7]], 3) == [ids[7:]]
    with pytest.raises(ConfigError, match="cannot be merged"):
        export_run(run, tmp_path / "out", "hf")
    assert export_run(run, tmp_path / "again", "peft").difference == 0.0
    with pytest.raises(ConfigError, match="reduction_factor"):
        tune.resolve(tune_section(method="houlsby", adapter=str(run / "adapter"), reduction_factor=8))


@pytest.mark.parametrize("scaling", ["learned", "channel"])
def test_the_scaling_decays_as_the_matrices_do_and_the_biases_do_not(scaling):
    """transformers' Trainer, which the library's is made of, leaves out norms and what has bias in its name."""
    made = tuned(tune_section(method="houlsby", scaling=scaling))
    mask = decay_mask(partition(made.params, made.mask)[0], made.model.weights)
    decays = {path[-1]: flag for path, flag in leaves_with_path(mask) if flag is not None}
    assert decays == {"down": True, "up": True, "scaling": True, "down_bias": False, "up_bias": False}


@pytest.mark.parametrize(("scaling", "dropout"), [(4.0, 0.0), (1.0, 0.5), (4.0, 0.5)])
def test_no_constant_scales_a_product_with_its_bias(scaling, dropout):
    # XLA for GPUs took it for a factor of the product alone (xla issue 46110).
    hooks = BottleneckHooks("parallel", 2, "relu", scaling, dropout, "default")
    own = {"output_adapters": {name: jnp.ones(w.shape) for name, w in hooks._adapter("output_adapters", 4).items()}}
    noise = Noise(jax.random.key(0), jnp.arange(3))
    x = jnp.ones((3, 4))
    program = jax.jit(lambda x, noise: hooks.mlp_output(own, x, x, x, noise)).lower(x, noise).as_text("hlo")
    kinds = dict(re.findall(r"(\S+) = f32\S+ (\w+)\(", program))
    scaled = re.findall(r"= f32\S+ (?:multiply|divide)\((\S+), (\S+)\)", program)
    assert scaled
    assert not [pair for pair in scaled if "add" in (kinds.get(name) for name in pair)]
