"""Runs over quantised bases, merged into the original weights, the dequantised ones, and quantised again. The peer is
peft, which merges into the unquantised model.
"""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.assemble import Source, assemble
from jaxtune.config import dump_config, load_config, make_config
from jaxtune.errors import ConfigError, DataError, ModelError
from jaxtune.export import export_run
from jaxtune.hf_io import open_source
from jaxtune.loading import open_model, open_run
from jaxtune.mesh import single_device_mesh
from jaxtune.quant.again import makers_of, write_quantized
from jaxtune.quant.gptq import round_to_nearest
from jaxtune.quant.grouped import Grouped
from jaxtune.quant.packing import unpack
from jaxtune.quant.scheme import AtLoad
from jaxtune.sample_loss import sample_of
from jaxtune.tune.merge import merged
from jaxtune.tune.peft_io import save_adapter
from tests.quant.checkpoints import write
from tests.quant.support import dequantized_logits
from tests.quant.support import write_quantized as quantised_by_transformers
from tests.runs import sections, unfinish
from tests.tune.support import Tuned, difference, randomised

TARGETS = ["q_proj", "down_proj"]
LORA = {"method": "lora", "rank": 4, "alpha": 12, "targets": TARGETS}
SCALE = 12 / 4
METHODS = {
    "lora": LORA,
    "dora": {**LORA, "method": "dora"},
    "adalora": {"method": "adalora", "targets": TARGETS},
    "ia3": {"method": "ia3", "targets": TARGETS, "feedforward_modules": ["down_proj"]},
    "oft": {"method": "oft", "targets": TARGETS, "oft_block_size": 8},
    "vera": {"method": "vera", "targets": TARGETS, "rank": 4},
    "loha": {"method": "loha", "targets": TARGETS, "rank": 2},
    "lokr": {"method": "lokr", "targets": TARGETS, "rank": 2},
    "layernorm": {"method": "layernorm"},
    "trainable_tokens": {"method": "trainable_tokens", "token_indices": [5, 7]},
}
IDS = np.random.default_rng(1).integers(0, 384, (2, 20))
NAME = "model.layers.{}.{}.weight"
MODULES = [(layer, module) for layer in range(2) for module in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model("qwen2")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """(directory, last eval loss) of a run over nf4 that holds data out."""
    home = tmp_path_factory.mktemp("trained")
    more = {"model": {"quantize": "nf4", "double_quant": True}, "eval": {"fraction": 0.3}, "data": {"packing": False}}
    rows = jaxtune.train(sections(base, home, tune=LORA, steps=4, **more))
    return home / "run", rows[-1]["eval_loss"]


def test_a_streaming_run_s_losses_are_of_its_first_rows(base, tmp_path):
    more = {"model": {"quantize": "int8"}, "data": {"streaming": True, "packing": False}}
    jaxtune.train(sections(base, tmp_path, tune=LORA, steps=2, **more))
    losses = export_run(tmp_path / "run", tmp_path / "out", "hf").losses
    assert losses.data == "training data" and losses.tokens > 50
    assert losses.written == pytest.approx(losses.run, abs=0.05)


def pretended(base, home, tune=LORA, **model):
    """The directory of a run that "ended" with a random adapter."""
    config = make_config(sections(base, home, tune=tune, model=model))
    source = Source.open(config.model, tuning=config.tune)
    made = assemble(source, source.tuning, single_device_mesh())
    params = randomised(Tuned(made.model, made.params, made.mask, source.tuning)).params
    run = home / "run"
    save_adapter(run / "adapter", source.tuning, made.model.weights, params, str(base))
    (run / "config.yaml").write_text(dump_config(config.model_copy(update={"tune": source.tuning})))
    return run


def added(run, onto):
    """key -> the weight of `onto`'s file with scale * B A, from the adapter's file."""
    adapter, weights = load_file(run / "adapter" / "adapter_model.safetensors"), load_file(onto / "model.safetensors")
    for layer, module in MODULES:
        prefix = f"base_model.model.model.layers.{layer}.{module}.lora_"
        product = adapter[f"{prefix}B.weight"].astype(np.float64) @ adapter[f"{prefix}A.weight"]
        key = NAME.format(layer, module)
        weights[key] = (weights[key] + SCALE * product).astype(np.float32)
    return weights


def of_layer(params, layer, module):
    block, name = module.replace("self_attn", "attention").split(".")
    return params["stacks"]["0"][block][name]["weight"], layer


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """What that run's export gives by default."""
    return export_run(trained[0], tmp_path_factory.mktemp("exported") / "out", "hf")


def assert_alike(directory, expected):
    found = load_file(directory / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, weight in found.items():
        np.testing.assert_allclose(weight, expected[key], atol=1e-6, err_msg=key)


def test_the_default_is_the_original_weights_and_b_a(trained, exported, base):
    assert exported.onto == f"the original weights of {base}"
    assert_alike(exported.directory, added(trained[0], base))
    key = NAME.format(0, "mlp.down_proj")
    assert np.abs(added(trained[0], base)[key] - load_file(base / "model.safetensors")[key]).max() > 1e-3


def test_the_losses_are_those_of_the_run_and_of_what_was_written(trained, exported):
    """The run's own evaluation, and the logits of the written model on each row."""
    run, evaluated = trained
    losses = exported.losses
    assert losses.data == "held-out data"
    assert losses.run == pytest.approx(evaluated, rel=1e-5)
    model = jaxtune.load_model(exported.directory)
    rows = sample_of(load_config(run / "config.yaml"), model.tokenizer).batch
    batch = {name: array[:, 0] for name, array in rows.items()}
    logits = model.logits(batch["tokens"]).astype(np.float64)
    each = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    assert losses.tokens == batch["mask"].sum()
    assert losses.written == pytest.approx(each[batch["mask"]].mean(), rel=1e-5)
    assert abs(losses.written - losses.run) > 1e-5


def test_the_command_prints_the_losses_in_one_line(exported, monkeypatch, capsys):
    from jaxtune import cli, export

    def stand_in(run, out, format, dtype, onto, base):
        assert (format, dtype, onto, base) == ("hf", "float32", "original", "there")
        return exported

    monkeypatch.setattr(export, "export_run", stand_in)
    options = ["--run", "r", "--out", "o", "--format", "hf", "--onto", "original", "--base", "there"]
    with pytest.raises(SystemExit) as left:
        cli.main(["export", *options])
    assert not left.value.code
    out, losses = " ".join(capsys.readouterr().out.split()), exported.losses
    assert f"Merged into {exported.onto}" in out
    assert (
        f"Mean loss on {losses.tokens} tokens of the held-out data: {losses.run:.4f} of the run, "
        f"{losses.written:.4f} of what was written, a difference of {losses.written - losses.run:+.4f}"
    ) in out


def test_the_dequantised_weights_are_the_run_s_own(trained, base, tmp_path):
    done = export_run(trained[0], tmp_path / "out", "hf", onto="dequantized")
    assert done.losses is None and "dequantised" in done.onto
    assert done.difference < 1e-4 * done.largest
    found, first = (load_file(directory / "model.safetensors") for directory in (tmp_path / "out", base))
    key = NAME.format(0, "mlp.up_proj")  # which has no adapter
    weight = AtLoad("nf4", True).layer(jnp.asarray(first[key])).weight(jnp.float32)
    np.testing.assert_allclose(found[key], weight, atol=1e-6)
    assert np.abs(found[key] - first[key]).max() > 1e-3


def test_a_run_that_goes_on_is_merged_from_its_checkpoint(trained, base, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    unfinish(tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "out", "hf").step == 4
    assert_alike(tmp_path / "out", added(trained[0], base))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_into_the_original_weights_as_peft_does(base, tmp_path, method):
    """peft's merge_and_unload over the unquantised model: every weight."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = pretended(base, tmp_path, METHODS[method], quantize="nf4")
    config = load_config(run / "config.yaml")
    opened = open_run(
        run, "float32", single_device_mesh(), config.model.model_copy(update={"quantize": None})
    ).assembled
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, run / "adapter").merge_and_unload().state_dict()
    ours, moved = merged(opened.params), 0
    for path, weight in ((p, w) for p, w in leaves(opened.model.weights) if p[0] != "hooks"):
        array = ours
        for part in path:
            array = array[part]
        rows = [array] if weight.layers is None else array
        for key, row in zip(weight.keys, rows, strict=True):
            np.testing.assert_allclose(row, theirs[key], atol=2e-5, err_msg=key)
            moved += np.abs(row - load_file(base / "model.safetensors")[key]).max() > 1e-3
    assert moved >= 1


def leaves(tree):
    from jaxtune.models.weights import leaves_with_path

    return leaves_with_path(tree)


def same_codes(leaf, row, direct):
    """The two sums of W and B A may differ in a last bit, and so may a code whose number lies halfway."""
    own = unpack(leaf.codes[row], leaf.bits) if isinstance(leaf, Grouped) else leaf.codes[row]
    np.testing.assert_allclose(leaf.scales[row].astype(float), direct.scales.astype(float), rtol=1e-3)
    return np.mean(np.asarray(own) != np.asarray(direct.codes)) < 1e-3


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("fp4", False), ("int8", False), ("int4", False)])
def test_quantised_again_has_the_codes_of_quantising_what_is_merged(trained, exported, base, tmp_path, kind, double):
    opened = open_model(exported.directory)
    model, scheme = opened.assembled.model, AtLoad(kind, double)
    makers = makers_of(scheme, {}, model.weights, open_source(exported.directory))
    about = model.weights, model.config, exported.directory, "float32", makers, {}
    values = write_quantized(tmp_path / "out", opened.assembled.params, *about)
    params, expected = open_model(tmp_path / "out").assembled.params, added(trained[0], base)
    for layer, module in [*MODULES, (1, "mlp.up_proj")]:
        weight = jnp.asarray(expected[NAME.format(layer, module)])
        leaf, row = of_layer(params, layer, module)
        direct = round_to_nearest(weight, bits=4, group=32) if kind == "int4" else scheme.layer(weight)
        assert same_codes(leaf, row, direct)
        np.testing.assert_allclose(leaf.dense(False)[row], of_layer(values, layer, module)[0][row], atol=1e-6)


def test_bitsandbytes_reads_what_is_quantised_again(trained, exported, base, tmp_path):
    """transformers, with the weights that bitsandbytes dequantises."""
    done = export_run(trained[0], tmp_path / "out", "hf", onto="quantized")
    assert done.onto == "the original weights of its base and quantised again (model.quantize: nf4)"
    assert done.losses is not None and done.losses.run == exported.losses.run
    ours = jaxtune.load_model(tmp_path / "out")
    weight = jnp.asarray(added(trained[0], base)[NAME.format(0, "self_attn.q_proj")])
    assert same_codes(*of_layer(ours.params, 0, "self_attn.q_proj"), AtLoad("nf4", True).layer(weight))
    assert difference(ours.logits(IDS), dequantized_logits(tmp_path / "out", IDS)) < 1e-4


def test_a_gptq_base_is_rounded_to_its_own_kind_of_grid(base, tmp_path):
    settings = {"bits": 4, "group_size": 32, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"}
    packed, dense = write(base, tmp_path, "gptq", settings, version=2, act_order=True, symmetric=False)
    run = pretended(packed, tmp_path)
    done = export_run(run, tmp_path / "out", "hf", onto="quantized")
    assert "the dequantised weights of its base and quantised again" in done.onto
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, False, False)
    params, expected = jaxtune.load_model(tmp_path / "out").params, added(run, dense)
    for layer, module in MODULES:
        weight = jnp.asarray(expected[NAME.format(layer, module)])
        direct = round_to_nearest(weight, bits=4, group=32, symmetric=False)
        leaf, row = of_layer(params, layer, module)
        assert same_codes(leaf, row, direct)
        np.testing.assert_array_equal(leaf.zeros[row], direct.zeros)


@pytest.fixture(scope="module")
def ready_made(base, tmp_path_factory):
    """A run over a checkpoint of bitsandbytes, made of `base`."""
    home = tmp_path_factory.mktemp("ready")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return pretended(quantised_by_transformers(base, home / "base", **settings), home)


def test_a_ready_made_base_s_original_is_the_one_that_is_named(ready_made, base, tmp_path):
    done = export_run(ready_made, tmp_path / "out", "hf", base=str(base))
    assert done.onto == f"the original weights of {base}"
    assert_alike(tmp_path / "out", added(ready_made, base))


def test_another_model_s_weights_are_found_out_by_the_loss(ready_made, base, tmp_path):
    shutil.copytree(base, tmp_path / "other")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 100
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"mean loss of what was written is .* the run's is .*nothing was kept"):
        export_run(ready_made, tmp_path / "out", "hf", base=str(tmp_path / "other"))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_biases_go_onto_the_original_weights(base, tmp_path):
    """A method that ends in a whole model, here one of random weights: the biases alone are the run's."""
    config = make_config(sections(base, tmp_path, tune={"method": "bitfit"}, model={"quantize": "int8"}))
    shutil.copytree(base, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    first, rng = load_file(base / "model.safetensors"), np.random.default_rng(0)
    ended = {key: weight + rng.normal(size=weight.shape).astype("f4") * 0.01 for key, weight in first.items()}
    save_file(ended, tmp_path / "run" / "model" / "model.safetensors", metadata={"format": "pt"})
    export_run(tmp_path / "run", tmp_path / "out", "hf")
    assert any(key.endswith(".bias") for key in first)
    assert_alike(tmp_path / "out", {key: (ended if key.endswith(".bias") else first)[key] for key in first})


def test_loftq_is_merged_into_what_it_was_trained_on(base, tmp_path):
    run = pretended(base, tmp_path, {"method": "loftq", "rank": 4, "targets": TARGETS, "loftq_iter": 2}, quantize="nf4")
    done = export_run(run, tmp_path / "out", "hf")
    assert done.losses is None and "dequantised" in done.onto
    with pytest.raises(ConfigError, match="would count twice"):
        export_run(run, tmp_path / "again", "hf", onto="original")


def test_the_data_must_be_there_to_measure_a_loss_on(base, tmp_path):
    run = pretended(base, tmp_path, quantize="nf4")
    (tmp_path / "data.json").unlink()
    with pytest.raises(DataError, match=r"(?s)data\.json.*take onto dequantized"):
        export_run(run, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, {"onto": "quantized"}, "onto quantized: the base of this run, .*, is not quantised"),
        ({}, {"base": "elsewhere"}, "base elsewhere: the base of this run, .*, is not quantised"),
        ({"quantize": "nf4"}, {"onto": "raw"}, "onto 'raw'; allowed: original, dequantized, quantized"),
        ({"quantize": "nf4"}, {"base": "elsewhere"}, "itself has the original weights"),
        (None, {"onto": "original"}, r"quantised already \(bitsandbytes nf4\); name the model .*--base PATH"),
        (None, {"onto": "dequantized", "base": "elsewhere"}, "would do nothing with dequantized"),
        (None, {"format": "peft", "onto": "original"}, "is of a merged model; take the format hf"),
    ],
)
def test_what_cannot_be_had_is_refused(base, ready_made, tmp_path, model, options, message):
    run = ready_made if model is None else pretended(base, tmp_path, {"method": "layernorm"}, **model)
    with pytest.raises(ConfigError, match=message):
        export_run(run, tmp_path / "out", **{"format": "hf", **options})
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_quantised_itself_is_no_original(ready_made, tmp_path):
    with pytest.raises(ModelError, match=r"is quantised itself \(bitsandbytes nf4\)"):
        export_run(ready_made, tmp_path / "out", "hf", base=str(ready_made.parent / "base"))


def test_what_has_no_writer_says_what_has_one(base, tmp_path):
    settings = {"bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    packed, _ = write(base, tmp_path, "awq", settings, symmetric=False)
    with pytest.raises(
        ConfigError, match=r"the base is AWQ, and such checkpoints are not written; those that are: nf4"
    ):
        export_run(pretended(packed, tmp_path, {"method": "layernorm"}), tmp_path / "out", "hf", onto="quantized")
