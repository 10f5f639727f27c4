"""Runs over a quantised base, from the first step to the exports."""

import json

import numpy as np
import pytest

import jaxtune
from jaxtune.errors import CheckpointError, ConfigError
from jaxtune.export import export_run
from tests.quant.support import write_quantized
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
