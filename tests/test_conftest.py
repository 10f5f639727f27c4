"""The fixtures do what the other tests rely on."""

import json

import numpy as np
import pytest


def test_the_tiny_tokenizer_round_trips_any_text(tiny_tokenizer):
    text = "Zwölf 船 — 🛶\n\tx = 'y'  # done"
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(text)) == text
    assert len(tiny_tokenizer) <= 384


def test_the_tiny_tokenizer_writes_chatml(tiny_tokenizer):
    messages = [{"role": "user", "content": "Hello"}]
    text = tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer.encode("<|im_end|>") == [tiny_tokenizer.eos_token_id]


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3"])
def test_a_tiny_model_is_a_directory_that_transformers_reads(tiny_model, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tiny_model(family)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.model_type == family
    assert len(AutoTokenizer.from_pretrained(directory)) <= model.config.vocab_size
    for name, weight in model.named_parameters():
        assert weight.std() > 0.01, f"{name} is constant"


def test_the_same_settings_give_the_same_tiny_model(tiny_model):
    assert tiny_model("llama") == tiny_model("llama")
    assert tiny_model("llama") != tiny_model("llama", num_key_value_heads=4)


def test_a_tiny_model_can_be_sharded_and_half_precision(tiny_model):
    directory = tiny_model("qwen2", dtype="bfloat16", max_shard_size="100KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


def test_a_child_process_sees_the_devices_it_was_given(run_python):
    done = run_python("import jax; print(jax.device_count(), jax.devices()[0].platform)", devices=8)
    assert done.stdout.split() == ["8", "cpu"], done.stderr


def test_a_child_process_finds_the_checkout_from_anywhere(run_python, tmp_path, repository):
    done = run_python("import jaxtune; print(jaxtune.__path__[0])", cwd=tmp_path)
    assert done.stdout.strip() == str(repository / "jaxtune"), done.stderr


@pytest.mark.real
def test_the_three_forms_of_smollm2_give_the_same_logits(smollm2):
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor([[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198]])
    with torch.no_grad():
        llama = AutoModelForCausalLM.from_pretrained(smollm2.llama)(tokens).logits
        qwen2 = AutoModelForCausalLM.from_pretrained(smollm2.qwen2)(tokens).logits
        gguf = AutoModelForCausalLM.from_pretrained(smollm2.gguf.parent, gguf_file=smollm2.gguf.name)(tokens).logits
    np.testing.assert_allclose(llama, gguf, atol=1e-3)
    np.testing.assert_allclose(qwen2, gguf, atol=1e-3)
