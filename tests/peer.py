"""Model directories and tokenizers written by transformers, the peer that the tests compare with.

The random models are tiny, and none of their weights has a value that hides a mistake: biases are not zero,
norms are not one. Needs torch; nothing under jaxtune/ does.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

TEXT = """The keeper of the lighthouse counts the ships that pass: one, two, three, and then none until morning.
What is your name? My name is Ada. Where do you live? I live by the sea, where the wind never rests.
She said "good night", shut the door and read until the lamp went out. It's late, and they're asleep.
小主，您又起来了？嗯，今天的天气真好。你是谁？我是甄嬛，家父是大理寺少卿甄远道。1234567890 + 42 = ?
def add(a, b):\n    return a + b\n
"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB = 384
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@cache
def tokenizer():
    """A byte-level BPE tokenizer of at most `VOCAB` tokens with the ChatML template; every text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXT.splitlines(), trainer)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHATML, **names)


def write_tokenizer(directory: Path, normalizer: Any = None) -> Path:
    """A Hugging Face tokenizer directory."""
    from tokenizers import Tokenizer

    tokenizer().save_pretrained(directory)
    if normalizer is not None:
        core = Tokenizer.from_file(str(directory / "tokenizer.json"))
        core.normalizer = normalizer
        core.save(str(directory / "tokenizer.json"))
    return directory


def write_tiny_model(
    directory: Path, family: str, *, seed: int = 0, dtype: str = "float32", max_shard_size: str = "5GB", **settings
) -> Path:
    """A random model of one of transformers' families ("qwen2", "llama", "mistral", "qwen3"), and its tokenizer.

    settings: fields of the family's config that differ from `SIZES`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SIZES, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.1)
            elif "norm" in name:
                weight.normal_(mean=1.0, std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    return write_tokenizer(directory)


def write_smollm2(gguf: Path, directory: Path) -> None:
    """The weights of the SmolLM2 GGUF as two Hugging Face directories in float32: `llama` and `qwen2`.

    SmolLM2 is a Llama; the Qwen2 of the same sizes with zero q, k and v biases is the same function.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    kept = (*SIZES, "rms_norm_eps", "tie_word_embeddings")
    fields = {name: getattr(source.config, name) for name in kept}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 100000.0}
    for name, kind in (("llama", LlamaForCausalLM), ("qwen2", Qwen2ForCausalLM)):
        model = kind(kind.config_class(**fields))
        absent, unknown = model.load_state_dict(source.state_dict(), strict=False)
        if unknown or not all(key.endswith("proj.bias") for key in absent):
            raise ValueError(f"{name}: keys absent {absent}, unknown {unknown}")
        for key in absent:
            torch.nn.init.zeros_(model.get_parameter(key))
        model.save_pretrained(directory / name)
        words.save_pretrained(directory / name)


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file with one JSON object on each line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
