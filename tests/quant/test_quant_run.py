"""Runs over a quantised base, from the first step to the exports."""

import json
import shutil

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.assemble import Source, assemble
from jaxtune.config import make_config
from jaxtune.errors import CheckpointError, ConfigError
from jaxtune.export import export_run
from jaxtune.mesh import single_device_mesh
from jaxtune.parallel.checks import check_fit
from tests.quant.support import edit_config, write_quantized
from tests.runs import sections, unfinish

TOKENS = np.random.default_rng(0).integers(0, 384, (2, 8))


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """(configuration, run directory) of QLoRA over a checkpoint of bitsandbytes."""
    home = tmp_path_factory.mktemp("qlora")
    base = write_quantized(tiny_model(), home / "base", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    tree = sections(base, home, steps=2, data={"max_length": 32})
    rows = jaxtune.train(tree)
    assert np.isfinite([row["loss"] for row in rows]).all()
    return tree, home / "run"


def test_a_run_s_model_is_its_base_with_its_adapter(run):
    tree, directory = run
    ours = jaxtune.load_model(directory)
    again = jaxtune.load_model(tree["model"]["path"], adapter=directory / "adapter")
    np.testing.assert_array_equal(ours.logits(TOKENS), again.logits(TOKENS))
    base = jaxtune.load_model(tree["model"]["path"])
    assert np.abs(ours.logits(TOKENS) - base.logits(TOKENS)).max() > 1e-3
    assert isinstance(ours.generate("What is 3?", max_new_tokens=3), str)


def test_peft_over_bitsandbytes_computes_the_adapter_s_logits(run):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tree, directory = run
    base = AutoModelForCausalLM.from_pretrained(tree["model"]["path"]).dequantize().float()
    peer = PeftModel.from_pretrained(base, directory / "adapter").eval()
    with torch.no_grad():
        theirs = peer(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(jaxtune.load_model(directory).logits(TOKENS), theirs, atol=1e-4)


def test_a_merged_export_is_a_plain_model_with_the_run_s_logits(run, tmp_path):
    _, directory = run
    done = export_run(directory, tmp_path / "merged", "hf")
    assert done.onto == "the dequantised weights of its base (bitsandbytes nf4)" and done.losses is None
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    ours = jaxtune.load_model(directory).logits(TOKENS)
    np.testing.assert_allclose(jaxtune.load_model(tmp_path / "merged").logits(TOKENS), ours, atol=1e-4)


def codes(model_or_assembled) -> list[np.ndarray]:
    layers = jax.tree_util.tree_leaves_with_path(model_or_assembled.params["stacks"])
    return [np.asarray(leaf) for path, leaf in layers if getattr(path[-1], "name", "") == "codes"]


@pytest.mark.parametrize("init", ["pretrained", "random"])
@pytest.mark.parametrize(("kind", "method"), [("int4", "lora"), ("nf4", "loftq")])
def test_weights_are_quantised_from_the_type_that_the_run_trained_with(tiny_model, tmp_path, kind, method, init):
    model = {"quantize": kind, "init": init}
    tune = {"method": method, "rank": 4, "targets": ["q_proj"]}
    tree = sections(tiny_model(), tmp_path, steps=1, tune=tune, model=model, precision={"params": "bfloat16"})
    jaxtune.train(tree)
    config = make_config(tree)
    source = Source.open(config.model, tuning=config.tune)
    trained, wide = (
        codes(assemble(source, source.tuning, single_device_mesh(), init=init, dtype=dtype))
        for dtype in ("bfloat16", "float32")
    )
    assert any((one != other).any() for one, other in zip(trained, wide, strict=True))
    for end in (lambda run: None, unfinish):
        end(tmp_path / "run")
        for dtype in ("float32", "bfloat16"):
            loaded = codes(jaxtune.load_model(tmp_path / "run", dtype=dtype))
            assert loaded and all((one == other).all() for one, other in zip(loaded, trained, strict=True))


def test_a_run_does_not_go_on_over_another_quantisation(run):
    tree, directory = run
    unfinish(directory)
    with pytest.raises(CheckpointError, match=r"model\.quantize: was null, now nf4"):
        jaxtune.train({**tree, "model": {**tree["model"], "quantize": "nf4"}})


def test_a_run_that_would_train_a_quantised_weight_ends_before_anything_is_read(tiny_model, tmp_path):
    tree = sections(tiny_model(), tmp_path, tune={"method": "full"})
    tree["model"]["quantize"] = "int8"
    with pytest.raises(ConfigError, match=r"tune\.method full over model\.quantize: int8 would train"):
        jaxtune.train(tree)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module")
def partly(tiny_model, tmp_path_factory):
    """(a checkpoint of which bitsandbytes left the down_proj as they were, the dense model that it stands for)."""
    from transformers import AutoModelForCausalLM

    from tests.peer import write_tokenizer

    home = tmp_path_factory.mktemp("partly")
    base = write_quantized(tiny_model(), home / "base", **NF4, llm_int8_skip_modules=["down_proj", "lm_head"])
    AutoModelForCausalLM.from_pretrained(base).dequantize().float().save_pretrained(home / "dense")
    return base, write_tokenizer(home / "dense")


DOWN = {
    "adapter": {"method": "lora", "rank": 4, "targets": ["q_proj"], "modules_to_save": ["down_proj"]},
    "model": {"method": "freeze", "train_patterns": ["down_proj.weight"]},
}


@pytest.mark.parametrize("kind", DOWN)
def test_a_map_that_the_checkpoint_left_unquantised_trains_as_it_does_over_the_dense_model(partly, tmp_path, kind):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, dense = partly
    losses, twin = (
        [row["loss"] for row in jaxtune.train(sections(path, tmp_path / path.name, steps=2, tune=DOWN[kind]))]
        for path in partly
    )
    np.testing.assert_allclose(losses, twin, rtol=1e-6)
    result = tmp_path / base.name / "run" / kind
    peer = AutoModelForCausalLM.from_pretrained(dense if kind == "adapter" else result).float()
    peer = (PeftModel.from_pretrained(peer, result) if kind == "adapter" else peer).eval()
    with torch.no_grad():
        theirs = peer(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(jaxtune.load_model(result.parent).logits(TOKENS), theirs, atol=1e-4)


def test_which_weights_are_quantised_is_the_files_word_and_not_the_settings(partly, tmp_path):
    base = shutil.copytree(partly[0], tmp_path / "base")
    edit_config(base, llm_int8_skip_modules=["up_proj"])  # older and newer transformers read such names differently
    with pytest.raises(ConfigError, match=r"would train model\.layers\.0\.mlp\.up_proj\.weight"):
        jaxtune.train(sections(base, tmp_path, tune={"method": "freeze", "train_patterns": ["up_proj.weight"]}))
    config = make_config(sections(base, tmp_path, tune=DOWN["adapter"]))
    source, mesh = Source.open(config.model), single_device_mesh()
    check_fit(config, mesh, source.config, source.quantized)
    made = assemble(source, config.tune, mesh)
    assert made.mask["stacks"]["0"]["mlp"]["down_proj"]["weight"] is True
